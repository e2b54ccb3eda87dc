"""Writes an HTML page that shows a pack as the model sees it, and statistics of the data set. It needs no network.

neo-megatron inspect --packs packs --tokenizer HF_DIR --output page.html
neo-megatron inspect --data shards --output page.html        # a data set that is not packed
"""

import argparse
from bisect import bisect_right
from pathlib import Path

from neo_megatron.atomic_files import write_atomically
from neo_megatron.checkpoint.hub import tokenizer_directory
from neo_megatron.data.chat import load_tokenizer, tokenizer_fingerprint
from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.shards.mixture import Mixture
from neo_megatron.errors import DataError
from neo_megatron.inspection.pack_view import Origin, Pack, pack_parts
from neo_megatron.inspection.page import GENERATOR, pack_part, page
from neo_megatron.inspection.statistics import count, count_packs
from neo_megatron.inspection.token_text import Decode
from neo_megatron.paths import output_place
from neo_megatron.storage.open import open_directory

_MOST_PACKS = 1 << 48
_HEAD = 1024  # bytes of a page that contain the name of its generator


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; negative numbers end with a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument(
        "--packs", metavar="DIR", help="directory written by neo-megatron pack, or the YAML file of a --mixture"
    )
    inputs.add_argument(
        "--data", metavar="DIR", help="directory written by neo-megatron preprocess, to see it without a pack"
    )
    parser.add_argument(
        "--pack",
        type=int,
        metavar="N",
        default=0,
        help="number of the pack, in the order drawn, from 0, as training names it: it counts on through epochs, and "
        "through the streams of a mixture; default: %(default)s",
    )
    parser.add_argument(
        "--epoch",
        type=int,
        metavar="N",
        default=0,
        help="number of the epoch in which --pack counts, from 0; default: %(default)s",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", default=1234, help="--seed of the training; default: %(default)s"
    )
    parser.add_argument(
        "--tokenizer", metavar="HF_DIR", help="Hugging Face directory or hub id, to show text; default: ids are shown"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="HTML file to write; an earlier page of this tool is replaced",
    )
    arguments = parser.parse_args()
    if arguments.pack < 0 or arguments.epoch < 0:
        parser.error("--pack and --epoch count from 0")
    return arguments


def main() -> None:
    """Writes the page."""
    arguments = parse_arguments()
    output = output_place(arguments.output)
    refuse_others(output)
    if arguments.packs:
        html = packs_page(arguments.packs, arguments.pack, arguments.epoch, arguments.seed, arguments.tokenizer)
    else:
        html = page(arguments.data, "", count(Mixture([arguments.data])), None, "")
    write_atomically(output, html.encode(errors="backslashreplace"))
    print(f"written to {output.resolve()}")


def refuse_others(output: Path) -> None:
    """Raises DataError if the output exists and is not such a page."""
    if output.exists():
        if not output.is_file():
            raise DataError(f"{output} is not a file that can be written; choose another --output")
        with open(output, "rb") as file:
            if GENERATOR not in file.read(_HEAD):
                raise DataError(f"{output} exists and is not a page of this tool; choose another --output")


def packs_page(location: str, number: int, epoch: int, seed: int, tokenizer: str | None) -> str:
    """The page of a directory of packs or of a mixture, with one of its packs.

    Args:
        number: of the pack in the epoch, or in those from there on.

    Raises:
        DataError: a mixture is asked for an epoch, or the tokenizer is not that of the packs, or a number is too large.
    """
    data_set = PackDataset(location, _MOST_PACKS, seed)
    if epoch and len(data_set.streams) > 1:
        raise DataError(f"{location}: the streams of a mixture have epochs of their own; leave out --epoch")
    item = epoch * len(data_set.packs) + number
    if item >= _MOST_PACKS:
        raise DataError(f"--pack {number} of --epoch {epoch}: no run has that many packs; give smaller numbers")
    drawn = data_set.pack(item)
    index = drawn.index
    decode = open_tokenizer(tokenizer, index.location, index.data.tokenizer["sha256"]) if tokenizer else None
    pack = Pack.of_item(data_set[drawn.number])
    origins = [origin(index.data, sample) for sample in drawn.samples.tolist()]
    parts = pack_parts(pack, origins, decode)
    shown = pack_part(pack, parts, drawn.number, drawn.epoch, seed)
    statistics = count_packs(index, open_directory(index.location))
    title = f"Pack {drawn.number} of {location}"
    return page(title, shown, statistics, index.manifest, parts["token_facts"])


def open_tokenizer(directory: str, location: str, fingerprint: str) -> Decode:
    """Ids -> text, special tokens included."""
    tokenizer = load_tokenizer(tokenizer_directory(directory))
    if tokenizer_fingerprint(tokenizer.backend_tokenizer.to_str()) != fingerprint:
        raise DataError(f"{directory} is not the tokenizer that {location} was made with; give that one")
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def origin(data: Mixture, sample: int) -> Origin:
    """The data set, file and record that a sample comes from."""
    number = bisect_right(data.starts, sample) - 1
    source, record = data.sets[number].source(sample - data.starts[number])
    return Origin(source["name"], source["annotations"], record)
