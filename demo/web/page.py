"""The page in gradio: its steps from left to right. session.py has their actions, show.py the look of results."""

import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path

import gradio as gr

from demo.web import session as do
from demo.web import show
from demo.web.session import Example, Model, Session
from util.errors import UserError

HERE = Path(__file__).parent
PICK = """element.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) trigger("pick", { number: Number(button.dataset.number) });
});"""
UPLOAD = "20mb"
USERS = 32  # sessions that are remembered, of at most some 12 MB each
WAITING = 20  # requests in the queue
HOUR = 3600  # seconds after which uploads are deleted


def build(model: Model, examples: list[Example]) -> gr.Blocks:
    """The page over a model."""
    told = "Mark a thing in one picture. The page finds things of the same kind in another."
    if not model.takes_supports:
        told = "Name a thing. The page finds it in a picture: roughly, from the name alone."
    before = int(model.takes_supports)  # steps before the name
    named = before + int(model.takes_text)
    with gr.Blocks(title="Few-shot segmentation", analytics_enabled=False, delete_cache=(600, HOUR)) as page:
        state = gr.State(Session())
        gr.HTML(f"<h1>Find things in pictures</h1><p>{told}</p><small>{escape(model.about)}</small>", elem_classes="head")
        strip = gr.HTML(html_template=show.examples(examples), js_on_load=PICK, visible=bool(examples))
        with gr.Row(equal_height=True):
            with gr.Column(scale=3, min_width=270, elem_classes="card", visible=model.takes_supports):
                step(1, "Example", "A photo with the thing in it. " + (
                     "It needs no mask: the name counts." if not model.needs_masks else
                     "Paint over it, drag a box around it, or give a mask file."
                     + (" Without an example the name alone counts." if model.takes_text else "")))  # fmt: skip
                with gr.Column() as choose:
                    photo = upload("photo with the thing", "photo")
                with gr.Column(visible=False) as at_hand:
                    painter = gr.HTML(show.painter(None), html_template=(HERE / "painter.html").read_text(),
                                      js_on_load=(HERE / "painter.js").read_text())  # fmt: skip
                    with gr.Row(elem_classes="tools"):
                        mask = gr.UploadButton("Mask file", elem_id="mask", size="sm", min_width=60)
                        more = gr.Button("Add another", size="sm", min_width=60)
                        other = gr.Button("Remove", size="sm", min_width=60)
                kept, wrong = gr.HTML(), gr.HTML()
            with gr.Column(scale=2, min_width=180, elem_classes="card", visible=model.takes_text):
                step(before + 1, "Name", "What the thing is called, in plain English.")
                text = gr.Textbox(label="class name", placeholder="star" if model.words else "dog", max_length=do.MAX_TEXT,
                                  max_lines=1)  # fmt: skip
                if model.words:
                    gr.HTML(f"This model knows words of the drawn demo world: {', '.join(model.words)}.", elem_classes="hint")
            with gr.Column(scale=3, min_width=270, elem_classes="card"):
                step(named + 1, "Picture to search", "Any picture in which the thing may be.")
                query = upload("picture to search", "query")
                run = gr.Button("Find it", variant="primary")
            with gr.Column(scale=4, min_width=300, elem_classes="card"):
                step(named + 2, "Result", "Blue is what was found. The threshold says how sure it has to be.")
                failed = gr.HTML()
                result = gr.HTML(show.EMPTY, elem_classes="result")
                threshold = gr.Slider(0.01, 0.99, 0.5, step=0.01, label="threshold")
        details = gr.HTML(elem_classes="details")

        def support_changed(session: Session, problem: str = "") -> dict:
            there = session.support is not None
            return {
                state: session, choose: gr.update(visible=not there), at_hand: gr.update(visible=there), photo: None,
                painter: show.painter(session.support), kept: show.kept(session.kept), wrong: show.message(problem),
            }  # fmt: skip

        def change_support(action: Callable[..., Session]) -> Callable[..., dict]:
            def act(session: Session, *inputs: dict) -> dict:
                try:
                    return support_changed(action(session, *map(file, inputs)))
                except UserError as error:
                    return {wrong: show.message(str(error))} | ({photo: None} if action is do.open_support else {})

            return act

        def pick(session: Session, threshold: float, event: gr.EventData) -> dict:
            example = examples[event.number]
            session = replace(Session(), support=example.support if model.takes_supports else None)
            shown = {text: example.name * model.takes_text, query: example.query}
            return support_changed(session) | shown | result_changed(session, threshold)

        def segment(session: Session, painted: dict | None, text: str, query: dict | None, threshold: float) -> dict:
            try:
                session = do.segment(model, session, painted, text, file(query))
                return {state: session} | result_changed(session, threshold)
            except UserError as error:
                session = replace(session, found=None)
                return {state: session} | result_changed(session, threshold, str(error))

        def result_changed(session: Session, threshold: float | None, problem: str = "") -> dict:
            threshold = 0.5 if threshold is None else threshold  # None: its field is empty
            return {result: show.result(session.found, threshold), details: show.details(session.found, threshold),
                    failed: show.message(problem)}  # fmt: skip

        support_outputs = [state, choose, at_hand, photo, painter, kept, wrong]
        result_outputs = [result, details, failed]
        raw = {"preprocess": False, "api_visibility": "private"}  # uploads unopened, see `file`
        quiet = raw | {"show_progress": "hidden"}
        photo.input(change_support(do.open_support), [state, photo], support_outputs, **quiet)
        mask.upload(change_support(do.open_mask), [state, mask], support_outputs, **quiet)
        more.click(change_support(partial(do.keep, masked=model.needs_masks)), [state, painter], support_outputs, **quiet)
        other.click(change_support(do.remove), [state], support_outputs, **quiet)
        strip.pick(pick, [state, threshold], [*support_outputs, *result_outputs, text, query], **quiet)
        gr.on([run.click, text.submit], segment, [state, painter, text, query, threshold], [state, *result_outputs],
              concurrency_id="model", concurrency_limit=1, **raw)  # fmt: skip
        threshold.input(lambda session, at: result_changed(session, at), [state, threshold], result_outputs,
                        trigger_mode="always_last", **quiet)  # fmt: skip
    return page.queue(max_size=WAITING, default_concurrency_limit=2, api_open=False)


def launch(page: gr.Blocks, host: str, port: int | None) -> str:
    """Serves the page in the background (`page.block_thread()` waits for Ctrl-C) and returns its address.

    Raises:
        UserError: it cannot listen there.
    """
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
        _, address, _ = page.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, inbrowser=False,
            theme=theme, css_paths=HERE / "page.css", footer_links=[], max_file_size=UPLOAD, state_session_capacity=USERS,
            run_history=False, enable_monitoring=False, ssr_mode=False,
        )  # fmt: skip
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on host {host}, port {port or 'any'}: {error}; give others: --host, --port") from error
    return address


def step(number: int, title: str, text: str) -> None:
    gr.HTML(f"<h2><span>{number}</span>{title}</h2><p>{text}</p>", elem_classes="step")


def upload(label: str, name: str) -> gr.Image:
    """A place for an image file."""
    return gr.Image(label=label, elem_id=name, format="png", sources=["upload", "clipboard"], buttons=[], height=230)


def file(value: dict | None) -> str | dict | None:
    """Return the path of an upload, unopened by gradio, so that our reader reports its faults. Else the value itself."""
    return value["path"] if isinstance(value, dict) and "path" in value else value
