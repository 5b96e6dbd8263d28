# SPDX-License-Identifier: Apache-2.0
"""From sources to datasets: the steps of a preparation in order, and the manifest that it writes."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from cpt_algorithms.files import write_json
from cpt_algorithms.preparation.contamination import BenchmarkItems
from cpt_algorithms.preparation.lm_eval_items import DOCUMENTS, write_lm_eval
from cpt_algorithms.preparation.manifest import (
    DatasetRecord,
    Earlier,
    Manifest,
    Request,
    SourceRecord,
    TokenizerRecord,
    versions,
)
from cpt_algorithms.preparation.packing import SPLITS, Counts, Hits, Selection, Selector
from cpt_algorithms.preparation.parts import PackJob, Tokenized, TokenizeJob, columns, leftover, pack, tokenize
from cpt_algorithms.preparation.reading import MAX_INSTALLED_BYTES, PrepareError, Unit, columns_of
from cpt_algorithms.preparation.sampling import Sampling, sampled_units
from cpt_algorithms.preparation.sources import MADE, MOST_LISTED, Part, Source, part_size, parts_of, read
from cpt_algorithms.preparation.tokenizer import document_ends, hash_tokenizer, train_tokenizer

__all__ = ['prepare', 'resumable']

MOST_DECODED = 1 << 20  # tokens at once


@dataclass
class _Dataset:
    """One dataset while it is made."""

    name: str
    sources: list[Source]
    files: dict[str, list[str]]
    size: int | None
    part_size: int


@dataclass
class _Decision:
    """The selection from a dataset: its parts in order, and the share of each."""

    parts: list[Part]
    tokenized: list[Tokenized]
    selections: list[dict[str, Selection]]
    ended: bool


def prepare(
    request: Request,
    sources: list[Source],
    files: dict[str, list[str]],
    partial: Path,
    engine: Any,
    tokenizer: Any,
    earlier: list[Earlier],
    items: BenchmarkItems | None = None,
) -> Path:
    """Do the work of a request, or what an earlier call has left of it in ``partial``; the finished folder in there.

    Args:
        request: What decides the result.
        sources: In order; those of one dataset follow one another.
        files: The files of each source, by ``str(source)``.
        partial: Folder to work in.
        engine: A :class:`~cpt_algorithms.preparation.engines.LocalEngine` or one like it.
        tokenizer: None to train one on the first dataset.
        earlier: Data prepared before.
        items: Of benchmarks, that documents must not share words with. Default: ``None``.

    Raises:
        PrepareError: If the input is not as it should be.
    """
    work, result = partial / 'work', partial / 'result'
    _take_back(work, result)
    (work / 'packed').mkdir(parents=True, exist_ok=True)
    result.mkdir()
    datasets = _datasets(request, sources, files)
    if tokenizer is None:
        assert request.vocab_size
        texts = _training_texts(_parts(datasets[0], request, work, engine), request.val_fraction)
        tokenizer = train_tokenizer(islice(texts, request.tokenizer_documents), request.vocab_size)
    tokenizer.save_pretrained(result / 'tokenizer')
    tokenizer_hash = hash_tokenizer(result / 'tokenizer')
    ends = document_ends(tokenizer, request.bos_text, request.eos_text)
    backend = work / f'tokenizer-{tokenizer_hash}.json'
    backend.write_text(tokenizer.backend_tokenizer.to_str(), encoding='utf-8')

    looked_for = None
    if items is not None:
        items.save(looked_for := work / f'items-{items.digest}.npz')

    def jobs(parts: Iterable[Part]) -> Iterator[TokenizeJob]:
        around, val_fraction, near = ends, request.val_fraction, request.near_duplicates
        for part in parts:
            place = looked_for and str(looked_for)
            yield TokenizeJob(
                part, str(backend), tokenizer_hash, around, val_fraction, near, place, str(work / 'parts')
            )

    names = {'digests': 'documents.npy'} | ({'signatures': 'signatures.npy'} if request.near_duplicates else {})
    before = {key: [file for data in earlier for file in data.keys(name, work)] for key, name in names.items()}
    described = {}
    for dataset in datasets:
        decision = _decide(dataset, request, work, engine, jobs, before)
        hits: dict[str, Hits] = {}
        if items is not None:
            (result / dataset.name).mkdir()
            listed = result / dataset.name / 'contaminated.jsonl'
            hits = _write_hits(listed, items, decision, request)
        described[dataset.name] = _write(dataset, decision, request, work, result, engine, tokenizer, hits)
        for split in SPLITS:
            for key, name in names.items():
                file = result / dataset.name / split / name
                _write_keys(file, key, decision, split)
                before[key].append(file)
    record = TokenizerRecord(
        vocab_size=len(tokenizer),
        eos_token=tokenizer.eos_token,
        eos_token_id=tokenizer.eos_token_id,
        document_start=tokenizer.convert_ids_to_tokens(ends[0]),
        document_end=tokenizer.convert_ids_to_tokens(ends[1]),
        hash=tokenizer_hash,
        files=sorted(file.name for file in (result / 'tokenizer').iterdir()),
    )
    manifest = Manifest(
        request=request,
        tokenizer=record,
        earlier={data.location: data.manifest.request.datasets for data in earlier},
        datasets=described,
        engine=engine.name,
        versions=versions(),
    )
    write_json(result / 'manifest.json', manifest.model_dump())
    return result


@contextmanager
def resumable(partial: Path) -> Iterator[None]:
    """Errors say that what is finished is kept, if anything is."""
    advice = f'the same command goes on from {partial}'
    try:
        yield
    except BrokenProcessPool as error:
        raise PrepareError(
            f'a process was killed, perhaps for lack of memory: try fewer --workers ({advice})'
        ) from error
    except PrepareError as error:
        if not any((partial / 'work' / 'parts').glob('[!.]*')):
            shutil.rmtree(partial)
            raise
        raise PrepareError(f'{error} ({advice}, which can be deleted)') from error


def _datasets(request: Request, sources: list[Source], files: dict[str, list[str]]) -> list[_Dataset]:
    max_tokens = request.max_train_tokens and request.max_train_tokens + (request.max_val_tokens or 0)
    datasets = []
    for name in dict.fromkeys(source.dataset for source in sources):
        own = [source for source in sources if source.dataset == name]
        known = all(source.kind not in MADE for source in own)
        size = sum(os.path.getsize(file) for source in own for file in files[str(source)]) if known else None
        datasets.append(_Dataset(name, own, files, size, part_size(size, max_tokens)))
    return datasets


def _parts(dataset: _Dataset, request: Request, work: Path, engine: Any) -> Iterator[Part]:
    """The parts of a dataset, in order."""

    def sampled(sampling: Sampling, spool: Path) -> Iterator[tuple[Unit, int]]:
        return sampled_units(sampling, spool, engine)

    for source in dataset.sources:
        key = hashlib.blake2b(json.dumps([str(source), dataset.part_size]).encode(), digest_size=8).hexdigest()
        found = dataset.files[str(source)]
        spool = work / 'spool' / key
        yield from parts_of(source, found, request.text_key, dataset.part_size, spool, sampled)


def _training_texts(parts: Iterable[Part], val_fraction: float) -> Iterator[str]:
    """The documents that belong to train, each once."""
    from cpt_algorithms.preparation.duplicates import digests, is_held_out

    seen = set()
    for text in chain.from_iterable(map(read, parts)):
        if not text or text.isspace():
            continue
        try:
            identity = digests([text])
        except UnicodeEncodeError:
            continue
        if identity.tobytes() not in seen and not is_held_out(identity, val_fraction)[0]:
            seen.add(identity.tobytes())
            # memory of a trainer grows with the longest; no shorter than what is installed, which is not cut
            yield from (text[at : at + MAX_INSTALLED_BYTES] for at in range(0, len(text), MAX_INSTALLED_BYTES))


def _decide(
    dataset: _Dataset, request: Request, work: Path, engine: Any, jobs: Any, before: dict[str, list[Path]]
) -> _Decision:
    """Tokenise a dataset as far as its limits need and decide which documents go where."""
    from tqdm import tqdm

    from cpt_algorithms.preparation.duplicates import is_in_subset

    size, given = request.max_seq_len, {'train': request.max_train_tokens, 'val': request.max_val_tokens}
    limits = {split: limit and limit // size * size for split, limit in given.items()}
    parts: list[Part] = []

    def noting() -> Iterator[Part]:
        for part in _parts(dataset, request, work, engine):
            parts.append(part)
            yield part

    decision = _Decision(parts, [], [], False)
    upper = Selector(limits)  # as if there were no duplicates
    total = dataset.size if limits['train'] is None else None
    with tqdm(desc=f'tokenizing {dataset.name}', total=total, unit='B', unit_scale=True, disable=None) as bar:
        results = engine.map(tokenize, jobs(noting()))
        for tokenized in results:
            bar.update(parts[len(decision.tokenized)].size)
            decision.tokenized.append(tokenized)
            held_out, lengths = tokenized.load('held_out'), tokenized.load('lengths')
            subset = is_in_subset(tokenized.load('digests'), request.train_subset)
            none = np.zeros(len(lengths), np.bool_)
            upper.select(held_out, lengths, lengths > 0, none, subset, none)
            if upper.ended:
                upper = _select(decision, limits, request, before)
                if decision.ended:
                    break
        results.close()
    if not decision.ended:
        _select(decision, limits, request, before)
    decision.parts = parts[: len(decision.tokenized)]
    return decision


def _select(
    decision: _Decision, limits: dict[str, int | None], request: Request, before: dict[str, list[Path]]
) -> Selector:
    """Decide over all parts so far; the selector returned goes on behind them."""
    from cpt_algorithms.preparation.duplicates import first_occurrences, is_in_subset, near_duplicates

    def files(name: str) -> list[Path]:
        return [tokenized.file(name) for tokenized in decision.tokenized]

    first_occurrences(files('digests'), files('first'), before['digests'])
    if request.near_duplicates:
        near_duplicates(files('signatures'), files('held_out'), files('near'), before['signatures'])
    selector = Selector(limits)
    decision.selections = []
    for tokenized in decision.tokenized:
        first = tokenized.load('first')
        near = tokenized.load('near') if request.near_duplicates else np.zeros(len(first), np.bool_)
        subset = is_in_subset(tokenized.load('digests'), request.train_subset)
        tainted = np.zeros(len(first), np.bool_)
        if request.decontaminate and not request.keep_contaminated:
            tainted[tokenized.load('hits')[:, 0]] = True
        held_out, lengths = tokenized.load('held_out'), tokenized.load('lengths')
        selections = selector.select(held_out, lengths, first, near, subset, tainted)
        decision.selections.append({split: _saved(tokenized, split, chosen) for split, chosen in selections.items()})
    decision.ended = selector.ended
    return selector


def _write_hits(file: Path, items: BenchmarkItems, decision: _Decision, request: Request) -> dict[str, Hits]:
    """List documents that share words with items of benchmarks, each by its identity, and count them: see ``Hits``."""
    from cpt_algorithms.preparation.duplicates import is_in_subset

    lines, found, before = [], [np.zeros((0, 3), np.int64)], 0
    for tokenized in decision.tokenized:
        hits, digests, held_out = (tokenized.load(name) for name in ('hits', 'digests', 'held_out'))
        taken = np.any([tokenized.load(split) for split in SPLITS], axis=0)
        counted = taken & ~held_out
        if not request.keep_contaminated:
            near = tokenized.load('near') if request.near_duplicates else np.zeros(len(taken), np.bool_)
            wanted = tokenized.load('first') & ~near
            of_splits = {'train': ~held_out & is_in_subset(digests, request.train_subset), 'val': np.array(held_out)}
            for split, own in of_splits.items():
                if decision.ended:  # what came behind the last one was not wanted any more
                    last = np.flatnonzero(tokenized.load(split))
                    own[last[-1] + 1 if len(last) else 0 :] = False
            taken = counted = wanted & np.any(list(of_splits.values()), axis=0)
        for document in np.unique(hits[taken[hits[:, 0]], 0]):
            own = hits[hits[:, 0] == document]
            of_tasks = {items.tasks[task]: own[own[:, 1] == task, 2].tolist() for task in np.unique(own[:, 1])}
            identity = digests[document].astype('>u8').tobytes().hex()
            lines.append({'document': identity, 'split': SPLITS[int(held_out[document])], 'items': of_tasks})
        found.append(hits[counted[hits[:, 0]]] + np.array([before, 0, 0]))
        before += tokenized.documents
    file.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return items.hits(np.concatenate(found))


def _saved(tokenized: Tokenized, split: str, selection: Selection) -> Selection:
    """The same, with the documents in a file and not in memory."""
    np.save(tokenized.file(split), selection.documents)
    size = int(tokenized.load('bytes')[selection.documents].sum())
    counts = selection.counts.model_copy(update={'bytes': size})
    return Selection(tokenized.load(split), selection.trim, counts)


def _write(
    dataset: _Dataset,
    decision: _Decision,
    request: Request,
    work: Path,
    result: Path,
    engine: Any,
    tokenizer: Any,
    hits: dict[str, Hits],
) -> DatasetRecord:
    """Write the shards of a dataset and describe it."""
    from tqdm import tqdm

    sources = {}
    for source in dataset.sources:
        own = [number for number, part in enumerate(decision.parts) if part.source == source]
        tokenized = [decision.tokenized[number] for number in own]
        sources[source.name] = SourceRecord(
            kind=source.kind,
            target=source.target,
            files=len(dataset.files[str(source)]),
            rows=sum(part.documents + part.skipped + part.broken for part in tokenized),
            skipped=sum(part.skipped for part in tokenized),
            broken=sum(part.broken for part in tokenized),
            first_broken=list(chain.from_iterable(part.first_broken for part in tokenized))[:MOST_LISTED],
            splits={
                split: sum((decision.selections[number][split].counts for number in own), Counts()) for split in SPLITS
            },
        )
    counts = {split: sum((source.splits[split] for source in sources.values()), Counts()) for split in SPLITS}
    for source in dataset.sources:
        _check_text(source, dataset.files[str(source)], sources[source.name], request.text_key)
    for split, count in counts.items():
        if count.tokens < request.max_seq_len:
            raise PrepareError(
                f'dataset {dataset.name}: {split} has no sample of {request.max_seq_len} tokens '
                f'({count.documents} documents, {count.duplicates} duplicates, '
                f'{count.near_duplicates} near-duplicates, {count.contaminated} contaminated, {count.tokens} tokens); '
                'give it more text or change --val-fraction, --max-seq-len'
            )
    jobs = _pack_jobs(decision, request, work)
    missing = [job for split in SPLITS for job in jobs[split] if job.samples and not Path(job.folder).exists()]
    for _ in tqdm(engine.map(pack, missing), f'packing {dataset.name}', len(missing), unit=' parts', disable=None):
        pass
    return DatasetRecord(
        **{key: sum(getattr(one, key) for one in sources.values()) for key in ('files', 'rows', 'skipped', 'broken')},
        first_broken=list(chain.from_iterable(source.first_broken for source in sources.values()))[:MOST_LISTED],
        splits={
            split: _assemble(result / dataset.name / split, jobs[split], request, counts[split], tokenizer)
            for split in SPLITS
        },
        sources=sources,
        contamination=hits,
        parts=len(decision.parts),
        lm_eval=write_lm_eval(result / 'lm_eval', dataset.name, _validation_texts(decision), request.max_seq_len),
    )


def _check_text(source: Source, files: list[str], record: SourceRecord, text_key: str) -> None:
    """Refuse a source of which nothing is text."""
    if record.broken + record.skipped < record.rows or not record.rows:
        return
    if record.broken:
        raise PrepareError(f'{source.label}: none of its {record.rows:,} rows can be read: {record.first_broken[0]}')
    columns = ', '.join(columns_of(source.kind, files[0], source.encoding) if files else [])
    column = f'in the column {text_key!r}; it has: {columns} (--text-key)' if columns else ''
    raise PrepareError(f'{source.label}: none of its {record.rows:,} rows has text {column}'.rstrip())


def _pack_jobs(decision: _Decision, request: Request, work: Path) -> dict[str, list[PackJob]]:
    """The jobs of each part and split, in order; a job's folder names everything that its shards depend on."""
    writer = {'compression': request.compression, 'hashes': ['xxh64']}
    jobs: dict[str, list[PackJob]] = {split: [] for split in SPLITS}
    for tokenized, selections in zip(decision.tokenized, decision.selections, strict=True):
        for split, selection in selections.items():
            mask = hashlib.blake2b(np.asarray(selection.documents).tobytes(), digest_size=16).hexdigest()
            content = [Path(tokenized.folder).name, split, mask, selection.trim, request.max_seq_len, writer]
            key = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
            samples = selection.counts.tokens // request.max_seq_len
            job = PackJob(
                tokenized, split, selection.trim, samples, request.max_seq_len, writer, str(work / 'packed' / key)
            )
            jobs[split].append(job)
    return jobs


def _assemble(folder: Path, jobs: list[PackJob], request: Request, counts: Counts, tokenizer: Any) -> Counts:
    """Move the shards of a split to their places, pack what the parts left over, write the index; the full counts."""
    from streaming import MDSWriter
    from streaming.base.util import merge_index

    max_seq_len = request.max_seq_len
    folder.mkdir(parents=True)
    indexes = []
    left_over = np.concatenate([np.zeros(0, np.int32), *map(leftover, jobs)])
    end = len(left_over) // max_seq_len * max_seq_len
    rest = left_over[end:]
    for number, job in enumerate(jobs):
        if job.samples:
            write_json(Path(f'{job.folder}.json'), f'{folder.parent.name}/{folder.name}/{number:05}')
            Path(job.folder).rename(folder / f'{number:05}')
            indexes.append(str(folder / f'{number:05}' / 'index.json'))
    if end:
        with MDSWriter(out=str(folder / 'rest'), columns=columns(max_seq_len), **jobs[0].writer) as writer:
            for row in left_over[:end].reshape(-1, max_seq_len):
                writer.write({'tokens': row})
        indexes.append(str(folder / 'rest' / 'index.json'))
    logging.disable(logging.WARNING)  # merge_index warns of the temporary folder it makes
    try:
        merge_index(indexes, str(folder), keep_local=True)
    finally:
        logging.disable(logging.NOTSET)
    dropped = np.concatenate([rest, *(_trimmed(job) for job in jobs if job.trim)])
    texts = (
        tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for tokens in np.split(dropped, range(MOST_DECODED, len(dropped), MOST_DECODED))
    )
    return counts.model_copy(
        update={
            'samples': counts.tokens // max_seq_len,
            'tokens': counts.tokens - len(rest),
            'leftover': counts.leftover + len(rest),
            'bytes': counts.bytes - sum(len(text.encode()) for text in texts),
        }
    )


def _trimmed(job: PackJob) -> Any:
    """The tokens of a part's last document that are over the limit."""
    lengths = job.tokenized.load('lengths')
    last = int(np.flatnonzero(job.tokenized.load(job.split))[-1])
    end = int(lengths[: last + 1].sum(dtype=np.int64))
    return job.tokenized.tokens[end - job.trim : end]


def _take_back(work: Path, result: Path) -> None:
    """Undo what a run that was killed had assembled: nothing that is finished is lost."""
    for record in (work / 'packed').glob('*.json'):
        place = result / json.loads(record.read_text())
        if place.is_dir():
            place.rename(record.with_suffix(''))
        record.unlink()
    shutil.rmtree(result, ignore_errors=True)


def _write_keys(file: Path, key: str, decision: _Decision, split: str) -> None:
    """The digests or signatures of the documents of a split, in order."""
    arrays = [tokenized.load(key) for tokenized in decision.tokenized]
    masks = [tokenized.load(split) for tokenized in decision.tokenized]
    rows = sum(int(np.count_nonzero(mask)) for mask in masks)
    keys = np.lib.format.open_memmap(file, 'w+', np.uint64, (rows, arrays[0].shape[1]))
    start = 0
    for array, mask in zip(arrays, masks, strict=True):
        chosen = array[mask]
        keys[start : start + len(chosen)] = chosen
        start += len(chosen)
    keys.flush()


def _validation_texts(decision: _Decision) -> list[str]:
    """The first validation documents of a dataset, of those that were kept when they were read."""
    parts = ((tokenized.load('val'), tokenized.held_out_texts()) for tokenized in decision.tokenized)
    return list(islice((text for chosen, held in parts for row, text in held if chosen[row]), DOCUMENTS))
