"""Names that no row of the data has, for questions whose values can only be copied: real ones from elsewhere, and parts of made-up ones."""

import functools
import re
from pathlib import Path

# Airlines, places and codes from elsewhere: none has a row.
CARRIERS = [name.strip() for name in """Lufthansa, Ryanair, Qantas, Air France, KLM, Emirates, Qatar, Etihad, Iberia, Vueling, Finnair, Icelandair, Norwegian, Wizz Air,
    easyJet, Aer Lingus, British Airways, Swiss, Austrian, LOT Polish, Turkish, El Al, Aegean, TAP, Alitalia, Air Canada, WestJet, Porter, Aeromexico, Volaris, Interjet, Avianca,
    Copa, LATAM, Azul, Gol, Aerolineas Argentinas, Air India, IndiGo, SpiceJet, Vistara, Thai, Garuda, Lion Air, AirAsia, Malaysia, Singapore, Cathay Pacific, China Eastern,
    China Southern, Hainan, Korean Air, Asiana, Japan, All Nippon, Peach, Philippine, Cebu Pacific, Vietnam, Air New Zealand, Fiji, Jetstar, Ethiopian, Kenya, EgyptAir,
    Royal Jordanian, Saudia, Gulf Air, Oman Air, Kuwait, South African, Air Mauritius, RwandAir, Spirit, Allegiant, Sun Country, Breeze, Avelo, Piedmont, Republic, Compass,
    GoJet, Cape Air, Silver, Boutique Air, Trans World, Pan Am, Eastern, Braniff, Northwest, Continental, Midwest, Aloha, Independence, Skybus, Tower Air, ValuJet, Western""".split(",")]
CITIES = [name.strip() for name in """Boise, Fresno, Reno, Spokane, Tucson, El Paso, Wichita, Lincoln, Topeka, Duluth, Fargo, Billings, Missoula, Helena, Casper, Cheyenne, Boulder, Aspen, Vail, Provo, Ogden,
    Eugene, Salem, Bend, Medford, Yakima, Tacoma, Juneau, Fairbanks, Nome, Hilo, Maui, Kona, Bakersfield, Stockton, Monterey, Santa Barbara, Palo Alto, Sedona, Flagstaff, Yuma, Lubbock,
    Amarillo, Waco, Laredo, McAllen, Corpus Christi, Galveston, Shreveport, Baton Rouge, Lafayette, Mobile, Montgomery, Huntsville, Gulfport, Biloxi, Jackson, Little Rock, Fort Smith,
    Springfield, Peoria, Champaign, Moline, Dubuque, Cedar Rapids, Sioux Falls, Rapid City, Green Bay, Appleton, La Crosse, Flint, Lansing, Kalamazoo, Saginaw, Toledo, Youngstown, Erie,
    Scranton, Allentown, Harrisburg, Lancaster, Trenton, Newport, Worcester, Concord, Nashua, Bar Harbor, Hyannis, Elmira, Ithaca, Binghamton, Utica, Plattsburgh, Roanoke, Lynchburg,
    Hagerstown, Salisbury, Durham, Hickory, Macon, Augusta, Valdosta, Gainesville, Tallahassee, Pensacola, Daytona Beach, Naples, Melbourne, Vero Beach, Toronto, Montreal, Ottawa,
    Vancouver, Calgary, Halifax, Quebec City, Winnipeg, Havana, Nassau, Kingston, Cancun, Mexico City, Monterrey, Panama City, Bogota, Lima, Quito, Caracas, Santiago, Buenos Aires,
    Rio de Janeiro, Brasilia, London, Paris, Rome, Milan, Venice, Madrid, Barcelona, Lisbon, Porto, Dublin, Edinburgh, Glasgow, Cardiff, Oslo, Bergen, Stockholm, Helsinki, Copenhagen,
    Amsterdam, Brussels, Berlin, Munich, Hamburg, Cologne, Vienna, Prague, Warsaw, Krakow, Budapest, Bucharest, Sofia, Athens, Istanbul, Ankara, Cairo, Tunis, Algiers, Casablanca, Dakar,
    Lagos, Accra, Nairobi, Kampala, Cape Town, Dubai, Doha, Tel Aviv, Amman, Beirut, Baghdad, Tehran, Karachi, Lahore, Delhi, Mumbai, Chennai, Kolkata, Dhaka, Colombo, Bangkok,
    Phuket, Hanoi, Manila, Jakarta, Bali, Perth, Sydney, Brisbane, Auckland, Wellington, Tokyo, Osaka, Kyoto, Seoul, Busan, Beijing, Shanghai, Taipei, Hong Kong, Macau""".split(",")]
CODES = """LHR LGW CDG ORY FRA MUC AMS MAD BCN LIS DUB EDI OSL ARN CPH HEL ZRH VIE FCO MXP ATH IST CAI TLV DXB DOH DEL BOM BKK SIN HKG NRT HND ICN PEK PVG SYD MEL AKL YYZ YUL YVR YYC YOW
    YHZ MEX CUN GDL BOG LIM SCL EZE GRU GIG PTY HAV NAS MBJ KIN BOI FAT RNO GEG TUS ELP ICT LNK DLH FAR BIL MSO HLN CPR EUG MFR JNU FAI ITO OGG KOA BFL MRY SBA FLG LBB AMA MAF CRP SHV
    BTR LFT MOB MGM HSV GPT JAN LIT FSM SGF PIA CMI MLI CID FSD RAP GRB ATW LSE FNT LAN AZO TOL ERI AVP ABE MDT ELM ITH BGM ROA LYH AGS VLD GNV TLH PNS DAB APF MLB TRI CHA HPN ISP SWF""".split()

NOT_PLACES = "Airport|Regional|Rgnl|Municipal|Muni|Intl|International|County|Field|Fld|Airpark|Arpt|Airfield|Memorial|Mem|Executive|Exec|Army|Air|AFB|AF|Afs|Lrrs|Heliport|Station|Seaplane|Naval|National|Public|Metropolitan|Metro|Gen|State|Landing|Jr|Aaf|Nas|Cgas"

# Parts of invented names. Any of the first with any of the second; none is an airline or city of the data (tested).
BEGINNINGS = "Blue Green Silver Golden Crimson Amber Polar Coral Maple Cedar Prairie Summit Harbor Lunar Solar Nordic Baltic Iberian Andean Celtic Zephyr Falcon Heron Condor Osprey Sparrow Comet Meteor Vector Orbit Pioneer Liberty Union Capital Crown Royal Imperial Global Trans Inter Euro Afro Pan Sky Cloud Star Wind Storm River Ocean Island".split()  # fmt: skip
SECOND = ["Jet", "Air", "Wings", "Express", "Connect", "Aviation", "Fly", "Link", "Regional", "Atlantic", "Pacific", "Airlines", "Airways", "Air Lines", ""]
STEMS = "Vel Mar Ost Kar Bren Dun Fal Gor Hald Ister Jor Kess Lun Mer Nor Orl Pell Quin Ros Sten Tor Ulm Ver Wes Yar Zan Ald Bex Cor Dre Elm Fen Gil Hav".split()
ENDINGS = "ton ville mora field burg haven port stad wick ford dale mont gate holm bridge".split()
BEFORE = ["", "", "", "", "Port ", "New ", "San ", "Fort ", "Lake ", "East ", "North ", "Saint ", "Mount "]
AFTER = ["", "", "", "", " City", " Falls", " Beach", " Springs", " Rapids", " Hills"]


@functools.cache
def places() -> list[str]:
    """Some hundred places that airports in the data's second table are named after, none of them one that flights go to: words to copy."""
    import pandas as pd

    folder = Path(__file__).resolve().parent.parent / "nycflights"
    cities = pd.read_parquet(folder / "flights.parquet", columns=["dest_city"]).dest_city.unique()
    known = {word for city in cities for word in city.split()}
    names = {re.sub(rf"\b({NOT_PLACES})\b\.?.*", "", name).strip() for name in pd.read_parquet(folder / "airports.parquet").name}
    return sorted(name for name in names if re.fullmatch("[A-Z][a-z]{3,}( [A-Z][a-z]{3,})?", name) and not known & set(name.split()))
