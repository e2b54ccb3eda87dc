"""The page in Gradio's blocks: layout, style and events."""

from html import escape
from pathlib import Path

import gradio as gr

from neo_megatron.demo.events import Events
from neo_megatron.demo.talk import Talk

HERE = Path(__file__).parent
LONGEST_QUESTION = 4000  # characters

# No event has an API, and none covers the page while it runs.
_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}

HEADER = """<header><h1>Ask NEO</h1><p>Drop an image, ask about it, and see where each word of the answer looked.</p>
<p class="soft">{facts}</p></header>"""
IMAGE = """<figure class="panel">
<div class="empty"><p><b>Drop an image here</b><br>or paste one, or choose it below</p></div>
<div class="shown"><div class="frame"><img><canvas></canvas><span class="tip" hidden></span></div>
<figcaption><span class="facts"></span><span class="scale" hidden>0<i></i><span class="top"></span>
<button type="button" class="bare"></button></span></figcaption></div>
<p class="refused" role="alert"></p>
</figure>"""
ANSWER = """<section class="card"><div class="words" aria-live="polite"></div><p class="note" role="alert"></p>
<div class="tools" hidden><span class="facts"></span></div></section>"""

_SYSTEM_FONT = ["system-ui", "sans-serif"]  # Gradio's themes load fonts from other servers
THEME = gr.themes.Base(neutral_hue="stone", font=_SYSTEM_FONT, font_mono=["ui-monospace"], radius_size="md").set(
    body_background_fill="#fbfaf8",
    body_background_fill_dark="#17191c",
    body_text_color="#24262a",
    body_text_color_dark="#e3e2de",
    block_background_fill="#fff",
    block_background_fill_dark="#1f2226",
    block_border_color="#e2dfd9",
    block_border_color_dark="#32353a",
    button_primary_background_fill="#2f6fb2",
    button_primary_background_fill_hover="#275e98",
    button_primary_background_fill_dark="#2f6fb2",
    button_primary_background_fill_hover_dark="#3b7dc2",
    input_background_fill="#f6f4f0",
    input_background_fill_dark="#17191c",
    button_secondary_background_fill="#f1eee8",
    button_secondary_background_fill_hover="#e7e3db",
    button_secondary_background_fill_dark="#2d3035",
    button_secondary_background_fill_hover_dark="#383c42",
    slider_color="#2f6fb2",
    slider_color_dark="#6aa7e6",
)
STYLE = (HERE / "style.css").read_text()


def build_page(talk: Talk, model: str, longest_answer: int) -> gr.Blocks:
    """The page for a checkpoint.

    Args:
        model: its name on the page.
        longest_answer: in tokens.
    """
    with gr.Blocks(title="Ask NEO", analytics_enabled=False) as page:
        gr.HTML(HEADER.format(facts=escape(f"{model}: {talk.facts}")))
        path, answer = gr.State(None), gr.State(None)
        with gr.Row(elem_id="sides"):
            with gr.Column(scale=5, min_width=320, elem_classes="sticky"):
                image = _drawn("image", IMAGE)
                upload = gr.UploadButton("Choose an image", elem_id="upload")
            with gr.Column(scale=4, min_width=320):
                question = gr.Textbox(
                    label="Question",
                    placeholder="What is in the image?",
                    max_lines=6,
                    max_length=LONGEST_QUESTION,
                    elem_id="question",
                )
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                stop = gr.Button("Stop", elem_id="stop")
                words = _drawn("answer", ANSWER)
                layer = _layer_slider(talk.pre_buffer_layers, talk.layers)

        events = Events(talk, longest_answer)
        upload.upload(events.look, [upload, answer], [image, path, words, answer], **_PRIVATE)
        gr.on([ask.click, question.submit], events.ask, [question, path, layer], [words, answer], **_PRIVATE)
        layer.change(events.show_layer, [layer, answer], words, trigger_mode="always_last", **_PRIVATE)
        stop.click(events.stop, answer, None, **_PRIVATE)
    return page


def _drawn(name: str, template: str) -> gr.HTML:
    """A part of the page that its script draws, with text as text, never as HTML."""
    script = (HERE / f"{name}.js").read_text()
    return gr.HTML(None, html_template=template, js_on_load=script, elem_id=name, apply_default_css=False)


def _layer_slider(pre_buffer: int, layers: int) -> gr.Slider:
    middle_of_llm = (pre_buffer + 1 + layers) // 2
    info = f"1 to {pre_buffer}: pre-buffer; {pre_buffer + 1} to {layers}: language model" if pre_buffer else None
    label = "Layer whose attention is shown"
    return gr.Slider(1, layers, value=middle_of_llm, step=1, label=label, info=info, elem_id="layer")
