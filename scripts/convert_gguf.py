#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Make a Hugging Face folder of a GGUF file, such as a stage can begin from.

    pip install gguf
    python scripts/convert_gguf.py model.gguf --out models/model

Weights are unpacked to float32; what was quantized stays as coarse as it is. transformers reads the file, but gives its
tokenizer other special tokens than the file says (4.51 and 4.57: BOS before every text, and as EOS): they are set here.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cpt_algorithms.files import hidden_sibling
from cpt_algorithms.launch.processes import OneLineParser, refuse_launcher, run_command


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser('convert_gguf', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('gguf', type=Path, metavar='FILE', help='a GGUF file')
    parser.add_argument('--out', type=Path, required=True, help='the folder to make; must not exist')
    return parser


def convert(file: Path, out: Path) -> None:
    """Write model and tokenizer of a GGUF file as a Hugging Face folder.

    Args:
        file: The GGUF file.
        out: The folder to make.

    Raises:
        ImportError: If the package gguf is not installed.
        OSError: If the file cannot be read, or the folder cannot be written.
        ValueError: If it is no GGUF file, or one of an architecture that transformers does not read.
    """
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, logging

    logging.set_verbosity_error()  # of the tokenizer that is replaced

    fields = GGUFReader(file).fields

    def said(key: str) -> object:
        field = fields.get(f'tokenizer.{key}')
        return None if field is None else field.contents()

    where = {'pretrained_model_name_or_path': str(file.parent), 'gguf_file': file.name}
    backend = AutoTokenizer.from_pretrained(**where).backend_tokenizer
    if not said('ggml.add_bos_token'):
        backend.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    names = {'bos_token': 'bos', 'eos_token': 'eos', 'unk_token': 'unknown', 'pad_token': 'padding'}
    ids = {token: said(f'ggml.{name}_token_id') for token, name in names.items()}
    special = {token: backend.id_to_token(number) for token, number in ids.items() if number is not None}
    # else it gives generate() token_type_ids, too, which no decoder takes
    inputs = ['input_ids', 'attention_mask']
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **special)
    tokenizer.chat_template = said('chat_template')
    AutoModelForCausalLM.from_pretrained(**where).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser()
    options = parser.parse_intermixed_args(arguments)
    if options.out.exists():
        parser.error(f'--out {options.out} exists already; nothing is overwritten')
    if not options.gguf.is_file():
        parser.error(f'{options.gguf} is no file')
    try:
        with hidden_sibling(options.out, ValueError(f'another run is making {options.out}')) as partial:
            convert(options.gguf, partial)
            partial.rename(options.out)
    except (ImportError, OSError, ValueError) as error:
        parser.error(f'{options.gguf}: {error}')
    print(f'wrote {options.out}')


if __name__ == '__main__':
    refuse_launcher()
    run_command(main)
