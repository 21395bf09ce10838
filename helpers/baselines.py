"""What to beat: prompts with no, fixed and retrieved examples, and copying the nearest training question's SQL."""

import time

from helpers import flights, generation

STAGES = ("zero-shot", "3-shot", "8-shot", "retrieved-8-shot", "nearest-question")

# Without an example to follow, the model answers in prose unless the question itself asks for a query.
ZERO_SHOT = "Write one SQLite query on the table flights that answers this question: "


class Neighbours:
    """The training questions nearest in words: TF-IDF over word and character n-grams, cosine similarity."""

    def __init__(self, train):
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.rows = list(train)
        self.vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
        self.matrix = self.vectorizer.fit_transform([r["question"] for r in self.rows])

    def nearest(self, question: str, k: int = 1) -> list[dict]:
        """The k nearest training rows, nearest last (where a prompt puts the most relevant example)."""
        similarity = (self.matrix @ self.vectorizer.transform([question]).T).toarray().ravel()
        return [self.rows[i] for i in similarity.argsort(kind="stable")[-k:]]


def answer(stage: str, questions, model=None, tokenizer=None, train=None, progress: str = "") -> tuple[list[str], float]:
    """Answers of one baseline: k-shot prompts with fixed or retrieved examples, or the nearest training question's SQL."""
    train = list(train or flights.load_questions("train"))
    if stage == "nearest-question":
        start = time.perf_counter()
        neighbours = Neighbours(train)
        return [neighbours.nearest(q["question"])[0]["sql"] for q in questions], time.perf_counter() - start
    if stage == "zero-shot":
        questions = [dict(q, question=ZERO_SHOT + q["question"]) for q in questions]
    return generation.ask(model, tokenizer, questions, flights.SCHEMA_PROMPT, shots_for(stage, train), progress)


def shots_for(stage: str, train: list[dict]):
    """question → its few-shot examples: none, 3 or 8 fixed ones of different intents, or the 8 nearest."""
    if stage == "zero-shot":
        return None
    if stage == "retrieved-8-shot":
        neighbours = Neighbours(train)
        return lambda question: neighbours.nearest(question, 8)
    bare = [r for r in train if r.get("style", "bare") == "bare" and r["sql"] != flights.REFUSAL]
    intents = "count avg_arrival_delay top_destinations pct_cancelled count_by_month count_late_departures max_distance list_airlines".split()
    fixed = [next(r for r in bare if r["intent"] == name) for name in intents[: int(stage.split("-")[0])]]
    return lambda question: fixed
