"""The app: a question in, the model's SQL, its rows and a chart out. `make app` starts it here; a Space of Hugging Face runs this very file.

What it does without a page stands in helpers/shipping/web.py; helpers/shipping/space.py writes a Space's folder.
"""

import argparse
import os
import sys

try:  # there on Spaces; on ZeroGPU it must be imported before torch
    from spaces import GPU as on_gpu
except ImportError:

    def on_gpu(function):
        return function


import helpers  # noqa: F401  # before torch

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported: nothing of anybody is sent anywhere
os.environ.setdefault("MPLBACKEND", "Agg")  # charts are drawn in threads, where a Mac has no windows
PORT = 7860
BLUE = {"button_primary_background_fill": "#1d4ed8", "button_primary_background_fill_hover": "#1e40af"}  # white on it is read easily, on Gradio's orange not
SQL_INK = ".cm-line span { color: #1e40af !important } .dark .cm-line span { color: #93c5fd !important }"  # Gradio's colours for SQL are too light


def gradio():
    """Gradio, of the release that the app is written for; CourseError without."""
    from helpers.files import CourseError

    try:
        import gradio
    except ImportError:
        gradio = None
    if gradio is None or not gradio.__version__.startswith("6."):
        there = f"Gradio {gradio.__version__} is installed" if gradio else "it isn't installed"
        raise CourseError(f"The app needs Gradio 6, and {there}: pip install -c constraints.txt -e '.[app]', then start again.")
    return gradio


def build(desk):
    """The page over a `web.Desk`, and its API: /ask takes a question and a stage, and gives the reply as JSON. CourseError without Gradio 6."""
    from helpers.shipping import web

    gr = gradio()

    @on_gpu
    def ask(question: str, stage: str = "sft") -> dict:
        """One question for the model of a stage (base, sft, dpo): question, sql, columns, rows, error, notes, confidence."""
        return desk.answer(question, stage)

    def page(question, stage):
        reply = ask(question, stage)
        drawn = web.chart(reply)
        rows = gr.Dataframe(web.table(reply), visible=bool(reply["columns"]))
        return web.told(web.said(reply)), gr.Code(reply["sql"], visible=bool(reply["sql"])), rows, gr.HTML(drawn, visible=bool(drawn))

    with gr.Blocks(title="Ask the flights", analytics_enabled=False) as app:
        gr.Markdown("# Ask the flights\nEvery flight that left New York City in 2013. A small language model writes SQL for your question, and the app runs it.")
        question = gr.Textbox(label="Your question", placeholder=web.EXAMPLES[0], lines=1, autofocus=True)
        stage = gr.Radio([(name, stage) for stage, name in web.STAGES.items()], value=desk.first(), label="Model")
        button = gr.Button("Ask", variant="primary")
        status = gr.HTML(web.told([]))
        query = gr.Code(label="SQL", language="sql", interactive=False, visible=False, lines=1, wrap_lines=True, show_line_numbers=False)
        rows = gr.Dataframe(label="Rows", interactive=False, wrap=True, visible=False)
        chart = gr.HTML(label="Chart", visible=False)
        gr.Examples([[one] for one in web.EXAMPLES], [question], label="Examples")
        gr.Markdown(f"**Limits.** {web.limits()}")
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model"}
        gr.on([button.click, question.submit], page, [question, stage], [status, query, rows, chart], api_visibility="private", **one_at_a_time)
        gr.api(ask, api_name="ask", **one_at_a_time)
    return app.queue(max_size=web.WAITING)


def serve(app, port: int = PORT, background: bool = False) -> str:
    """Starts the app on this machine alone (on a Space: where Spaces want it); its address. CourseError where the port is taken.

    `background`: returns at once, for a notebook; `app.close()` ends it.
    """
    gr = gradio()
    from starlette.middleware import Middleware  # Gradio's own

    from helpers.files import CourseError
    from helpers.shipping import web

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    policy = "" if os.environ.get("SPACE_ID") else web.POLICY  # a Space's page stands in a frame of another place
    try:
        _, address, _ = app.launch(
            server_port=port, share=False, inline=False, quiet=True, prevent_thread_lock=True, ssr_mode=False, mcp_server=False, run_history=False,
            enable_monitoring=False, footer_links=[], max_file_size=1, theme=gr.themes.Default(**fonts).set(**BLUE), css=SQL_INK,
            app_kwargs={"middleware": [Middleware(web.Fence, policy)]},
        )  # fmt: skip
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise CourseError(f"Port {port} is in use, by another app perhaps: end that one, or take another: make app PORT={port + 1}.") from None
    if not background:
        print(f"The app is at {address} (Ctrl-C ends it)", flush=True)
        app.block_thread()
    return address


def run(port: int) -> None:
    from helpers.shipping import web

    desk = web.Desk()
    app = build(desk)
    for stage in web.STAGES if os.environ.get("SPACES_ZERO_GPU") else [desk.first()]:  # a GPU's process there sees only what was loaded before
        if not web.missing(stage):
            print(f"loading {stage}", flush=True)
            desk.load(stage)
    try:
        serve(app, port)
    finally:
        app.close(verbose=False)
        desk.close()


def main(arguments=None) -> int:
    from helpers.command import status

    parser = argparse.ArgumentParser(prog="python app.py", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", PORT)))
    return status(run, parser.parse_args(arguments).port)


if __name__ == "__main__":
    sys.exit(main())
