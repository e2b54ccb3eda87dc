"""Serves a page to query a NEO: drop an image, ask, and see the attention of each word of the answer on the image.

    bash examples/demo/run.sh --model neo          # in a checkout: installs what is missing first

It listens on this machine only, loads nothing from elsewhere, and accepts the images that preprocessing
accepts.
"""

import argparse
import importlib.util
import os
import signal
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

import transformers

from neo_megatron.cli.chat_options import add_layout
from neo_megatron.cli.prompt_options import add_system
from neo_megatron.errors import DataError
from neo_megatron.inference.answering import MAX_NEW_TOKENS, Answerer


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; values out of range end with a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="HF_DIR", help="a NEO in Hugging Face form, or its hub id")
    parser.add_argument("--allow-pickle", action="store_true", help="read pickled weights if there are no safetensors")
    parser.add_argument(
        "--port", type=int, metavar="N", default=7860, help="0 to 65535; 0: any free port; default: %(default)s"
    )
    parser.add_argument(
        "--max-upload-mb", type=int, metavar="N", default=32, help="largest image file in MiB; default: %(default)s"
    )
    parser.add_argument(
        "--max-pixels", type=int, metavar="N", help="most pixels of a resized image; default: the checkpoint's"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        default=MAX_NEW_TOKENS,
        help="most tokens of an answer; default: %(default)s",
    )
    add_layout(parser)
    add_system(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, or auto for all GPUs; default: the first GPU, else cpu")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
        help="of weights and computation; auto, the default: as stored",
    )
    arguments = parser.parse_args()
    for name in ("max_upload_mb", "max_pixels", "max_new_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= arguments.port < 1 << 16:
        parser.error("--port must be from 0 to 65535")
    return arguments


def main() -> None:
    """Loads the checkpoint and serves the page on this machine until it is stopped."""
    arguments = parse_arguments()
    if importlib.util.find_spec("gradio") is None:
        raise DataError(
            "Gradio is not installed: start the page with `bash examples/demo/run.sh`, or run `pip install '.[demo]'` "
            "and then `pip install --no-deps 'gradio==6.31.*'`: it asks for an older Pillow than NEO needs"
        )
    listener = socket.create_server(("127.0.0.1", arguments.port))
    transformers.logging.set_verbosity_error()
    answerer = Answerer(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        max_pixels=arguments.max_pixels,
        allow_pickle=arguments.allow_pickle,
        chat_layout=arguments.chat_layout,
        system=arguments.system,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, with the uploads removed
    with tempfile.TemporaryDirectory(prefix="neo-demo-") as uploads, suppress(KeyboardInterrupt):
        os.environ["GRADIO_TEMP_DIR"] = uploads  # read when Gradio is imported
        from neo_megatron.demo.server import page_app, serve
        from neo_megatron.demo.talk import Talk

        largest_upload = arguments.max_upload_mb << 20
        app = page_app(Talk(answerer), Path(uploads), arguments.model, arguments.max_new_tokens, largest_upload)
        print(f"the page: http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        serve(app, listener)
