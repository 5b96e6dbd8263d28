# SPDX-License-Identifier: Apache-2.0
"""Data of lm-eval tasks, made of validation documents."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ['DOCUMENTS', 'DOCUMENT_CHARACTERS', 'ITEMS', 'continuations', 'passages', 'write_lm_eval']

ITEMS = 200  # of each kind and dataset
DOCUMENTS = 200  # they are taken from: the first of a dataset, and of each of its parts
DOCUMENT_CHARACTERS = 1 << 16  # of each of these


def boundary(text: str, limit: int) -> int:
    """Where to cut at most ``limit`` characters: after the last newline of their second half, or space, or all."""
    newline, space = (text.rfind(mark, limit // 2, limit) + 1 for mark in '\n ')
    return newline or space or limit


def passages(text: str, length: int) -> list[str]:
    """Cut a text into pieces of at most ``length`` characters, at a :func:`boundary`; joined, they are the text."""
    pieces = []
    while len(text) > length:
        end = boundary(text, length)
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text] if text else pieces


def _digest(text: str) -> bytes:
    from cpt_algorithms.preparation.duplicates import digests  # scipy: not for a wrong argument

    return digests([text]).astype('>u8').tobytes()


def in_hash_order(documents: Sequence[str], length: int) -> list[tuple[int, str]]:
    """The passages of all documents that are not blank, each text once, with the number of the document."""
    found = {piece: number for number, text in enumerate(documents) for piece in passages(text, length)}
    return sorted(((number, piece) for piece, number in found.items() if piece.strip()), key=lambda p: _digest(p[1]))


def continuations(documents: Sequence[str], length: int, count: int) -> list[dict[str, Any]]:
    """Items "which of 4 texts follows": one that does, three that follow something in other documents.

    All four begin at a :func:`boundary` and have as many characters, so that their likelihoods can be compared as they
    are.

    Args:
        documents: Texts.
        length: Characters of context and continuation at most; a quarter, or 64, is the continuation.
        count: Items wanted; where there are not enough other documents there are fewer.
    """
    size = min(length // 4, 64)
    split = []
    for number, piece in in_hash_order(documents, length)[: 10 * count]:
        end = boundary(piece, len(piece) - size) if len(piece) >= length // 2 else len(piece)
        if piece[:end].strip() and piece[end : end + size].strip():
            split.append((number, piece[:end], piece[end : end + size]))
    items = []
    for number, context, right in split:
        if len(items) == count:
            break
        others = list(dict.fromkeys(text for other, _, text in split if other != number and text != right))
        if len(others) >= 3:
            generator = random.Random(_digest(context + right))
            choices = [right, *generator.sample(others, 3)]
            generator.shuffle(choices)
            items.append({'context': context, 'choices': choices, 'answer': choices.index(right)})
    return items


def write_lm_eval(folder: Path, dataset: str, documents: Sequence[str], max_seq_len: int) -> dict[str, int]:
    """Write the data of lm-eval tasks, of a character per token that a model can read at once.

    Returns:
        Rows of each kind; one that has none gets no file.
    """
    documents = [text[:DOCUMENT_CHARACTERS] for text in documents]
    rows = {
        'passages': [{'text': piece} for _, piece in in_hash_order(documents, max_seq_len)[:ITEMS]],
        'continuations': continuations(documents, max_seq_len, ITEMS),
    }
    folder.mkdir(exist_ok=True)
    for kind, items in rows.items():
        if items:
            lines = ''.join(json.dumps(item) + '\n' for item in items)
            (folder / f'{dataset}_{kind}.jsonl').write_text(lines, encoding='utf-8')
    return {kind: len(items) for kind, items in rows.items()}
