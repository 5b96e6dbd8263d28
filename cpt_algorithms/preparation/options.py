# SPDX-License-Identifier: Apache-2.0
"""The options of a preparation, and the request that follows from them: everything that decides the result."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cpt_algorithms.files import exists, is_remote
from cpt_algorithms.preparation.manifest import FORMAT, Choices, Count, Earlier, Fraction, Request
from cpt_algorithms.preparation.reading import PrepareError
from cpt_algorithms.preparation.sampling import Sampling, model_hash
from cpt_algorithms.preparation.sources import Source
from cpt_algorithms.preparation.tokenizer import Parent, hash_tokenizer, unreadable
from cpt_algorithms.validation import PathStr

__all__ = ['DEFAULT_DATASETS', 'Options', 'make_request', 'sample_length']

DEFAULT_DATASETS = ['python=installed:python', 'cpp=installed:cpp']


class Options(Choices):
    """The options of ``scripts/prepare_data.py``, by their names; its ``--help`` says what each means."""

    out: PathStr
    dataset: list[str] = DEFAULT_DATASETS
    earlier: list[str] = []
    max_seq_len: Annotated[int, Field(ge=2)] | None = None
    near_duplicates: bool = False
    near_threshold: Fraction | None = None
    workers: Count | None = None
    engine: Literal['local', 'spark'] = 'local'
    work: PathStr | None = None

    @property
    def given_tokenizer(self) -> str | None:
        """The option that names the tokenizer; none if one is trained."""
        return self.tokenizer or self.parent or next(iter(self.earlier), None)

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            PrepareError: Naming one.
            StorageError: If ``out`` cannot be reached.
        """
        if not is_remote(self.out) and not Path(self.out).name:
            raise PrepareError(f'--out {self.out}: expected the name of a folder to make')
        if is_remote(self.out):
            exists(self.out)  # a bucket that cannot be reached, or has no store, is refused before anything is read
        for name in ('contamination_ngram', 'keep_contaminated'):
            if getattr(self, name) and not self.decontaminate:
                raise PrepareError(f'--{name.replace("_", "-")} is of --decontaminate, which is not given')
        if self.near_threshold is not None and not self.near_duplicates:
            raise PrepareError(f'--near-threshold {self.near_threshold} is of --near-duplicates, which is not given')
        for name in ('bos_text', 'eos_text'):
            if getattr(self, name) is not None and not self.given_tokenizer:
                flag = '--' + name.replace('_', '-')
                raise PrepareError(f'{flag} is for a given --tokenizer; one trained here has one special token, EOS')
        for name in ('vocab_size', 'tokenizer_documents'):
            if getattr(self, name) is not None and self.given_tokenizer:
                flag = '--' + name.replace('_', '-')
                raise PrepareError(f'{flag} is for a tokenizer trained here; that of {self.given_tokenizer} is given')
        if self.compression is not None:
            from streaming.base.compression import get_compressions, is_compression

            if not is_compression(self.compression):
                known = ', '.join(sorted(get_compressions()))
                raise PrepareError(f'--compression {self.compression}: Streaming knows {known}')

    def near_settings(self) -> dict[str, Any] | None:
        """The settings of near-duplicates, if these are looked for."""
        if not self.near_duplicates:
            return None
        from cpt_algorithms.preparation.duplicates import NearDuplicates

        given: dict[str, Any] = {} if self.near_threshold is None else {'threshold': self.near_threshold}
        return NearDuplicates(**given).model_dump()


def sample_length(options: Options, parent: Parent | None) -> int:
    """The tokens of a sample for this parent.

    Raises:
        PrepareError: If the parent cannot read as many, or a limit is below one sample.
    """
    length = options.max_seq_len or (parent.max_seq_len if parent else 128)
    if length is None:
        raise PrepareError(f'--parent {options.parent}: its config.json has no sequence length; give --max-seq-len')
    if parent and parent.max_seq_len and length > parent.max_seq_len:
        raise PrepareError(f'--max-seq-len {length}: --parent {parent.name} reads at most {parent.max_seq_len}')
    for flag, limit in (('max-train-tokens', options.max_train_tokens), ('max-val-tokens', options.max_val_tokens)):
        if limit is not None and limit < length:
            raise PrepareError(f'--{flag} {limit}: less than one sample of {length} tokens')
    return length


def _input(source: Source, files: list[str]) -> str | None:
    """What a source consists of, so that another one of the same name is noticed; None if that is not looked at."""
    if source.kind == 'sampled':
        return f'model {model_hash(Sampling.parse(source.target).folder)}'
    if source.kind == 'installed' or not files:
        return None
    return f'{len(files)} files, {sum(map(os.path.getsize, files))} bytes'


def make_request(
    options: Options,
    sources: Sequence[Source],
    files: dict[str, list[str]],
    max_seq_len: int,
    near: dict[str, Any] | None,
    earlier: Sequence[Earlier],
    items_hash: str | None,
) -> Request:
    """Everything that decides the result, as the manifest records it: of the user's files, their number and size."""
    folder = Path(options.tokenizer or '')
    try:
        given = (folder / 'tokenizer.json').is_file() and options.tokenizer is not None
        tokenizer_hash = hash_tokenizer(folder) if given else None
    except ValueError as error:
        raise unreadable(f'--tokenizer {options.tokenizer}: cannot load it', folder, error) from error
    trained = not options.given_tokenizer
    choices = {name: getattr(options, name) for name in Choices.model_fields}
    if trained:
        choices |= {'vocab_size': options.vocab_size or 4096}
        choices |= {'tokenizer_documents': options.tokenizer_documents or 2000}
    return Request(
        **choices,
        format=FORMAT,
        datasets=[str(source) for source in sources],
        files={
            str(source).split('=')[0]: described
            for source in sources
            if (described := _input(source, files[str(source)])) is not None
        },
        tokenizer_hash=tokenizer_hash,
        earlier={data.location: data.manifest.digest for data in earlier},
        max_seq_len=max_seq_len,
        near_duplicates=near,
        items_hash=items_hash,
    )
