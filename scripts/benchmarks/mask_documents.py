# SPDX-License-Identifier: Apache-2.0
"""The cost of ``mask_documents`` in a training step (forward and backward), of an MPT and of a Llama.

    python scripts/benchmarks/mask_documents.py                                   # on the CPU
    python scripts/benchmarks/mask_documents.py --device cuda --length 2048

Both sides alternate in one process, on the same rows of several documents each: the batch as it is, and as the
callback makes it.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--length', type=int, default=512, help='tokens of a row')
    parser.add_argument('--rows', type=int, default=4)
    parser.add_argument('--documents', type=int, default=5, help='in a row')
    parser.add_argument('--width', type=int, default=256)
    parser.add_argument('--layers', type=int, default=6)
    parser.add_argument('--repeats', type=int, default=30)
    parser.add_argument('--json', type=Path, help='also write the numbers here')
    return parser.parse_intermixed_args()


if __name__ == '__main__':
    OPTIONS = parse()  # before the imports that take seconds

import torch
from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from cpt_algorithms.replay.mask_documents import MaskDocuments
from cpt_algorithms.terminal import print_table

VOCABULARY, EOS = 4096, 0


def models(options: argparse.Namespace) -> dict[str, tuple[Any, Any, str]]:
    """By name: a model, the same one that can be told of documents, and which attention of transformers it has."""
    width, layers, length = options.width, options.layers, options.length

    def mpt(told: bool) -> Any:
        attention = {'attn_impl': 'torch', 'attn_uses_sequence_id': told}
        return MPTForCausalLM(
            MPTConfig(d_model=width, n_heads=8, n_layers=layers, max_seq_len=length, vocab_size=VOCABULARY,
                      attn_config=attention, init_device='cpu'),
        )  # fmt: skip

    llama = LlamaForCausalLM(
        LlamaConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=8,
                    max_position_embeddings=length, vocab_size=VOCABULARY, attn_implementation='sdpa'),
    )  # fmt: skip
    return {'MPT, torch': (mpt(False), mpt(True), ''), 'Llama, sdpa': (llama, llama, 'sdpa')}


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    torch.manual_seed(1)
    rows = torch.randint(1, VOCABULARY, (options.rows, options.length), device=options.device)
    size = -(-options.length // options.documents)
    rows[:, size - 1 :: size] = EOS
    batch = {'input_ids': rows, 'attention_mask': torch.ones_like(rows), 'labels': rows.clone()}
    found: dict[str, dict[str, list[float]]] = {}
    for name, (plain, told, attention) in models(options).items():
        callback = MaskDocuments(EOS)
        callback.attention = attention

        def step(masked: bool, of: tuple[Any, Any] = (plain, told), callback: MaskDocuments = callback) -> float:
            model = of[masked].to(options.device).train()
            begun = time.perf_counter()
            given = callback.masked(batch) if masked else batch
            logits = model(**{key: each for key, each in given.items() if key != 'labels'}).logits.float()
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).backward()
            model.zero_grad()
            if options.device == 'cuda':
                torch.cuda.synchronize()
            return time.perf_counter() - begun

        times: dict[str, list[float]] = {'without': [], 'with': []}
        for number in range(options.repeats + 2):
            for side, masked in (('without', False), ('with', True)):
                taken = step(masked)
                if number > 1:
                    times[side].append(taken)
        found[name] = times
    shown = Table(title=f'a training step of {options.rows} rows of {options.length} tokens on {options.device}, ms')
    for column in ('model', 'without', 'with mask_documents', 'ratio, median', 'quartiles'):
        shown.add_column(column, justify='right')
    for name, times in found.items():
        ratios = [a / b for a, b in zip(times['with'], times['without'], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        medians = (f'{1e3 * statistics.median(times[side]):.1f}' for side in ('without', 'with'))
        shown.add_row(name, *medians, f'{middle:.3f}', f'{low:.3f} to {high:.3f}')
    print_table(shown, Console())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({'length': options.length, 'times': found}, indent=1))


if __name__ == '__main__':
    main(OPTIONS)
