# SPDX-License-Identifier: Apache-2.0
"""Text that a model writes: replay where the data that it was trained on is not at hand.

torch and transformers are imported where a part is sampled.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

from pydantic import ConfigDict, Field, TypeAdapter

from cpt_algorithms.checkpoints.exports import exports, folder_of_pretrained, load_export, models_of
from cpt_algorithms.checkpoints.save_folder import batch_of
from cpt_algorithms.preparation.reading import PrepareError, Unit
from cpt_algorithms.preparation.tokenizer import document_ends, load_tokenizer, stop_tokens
from cpt_algorithms.validation import ConfigError, Section, parse_section

__all__ = ['Sampling', 'model_hash', 'sample', 'sampled_units']


WEIGHTS = ('.safetensors', '.bin')


class Sampling(Section):
    """How a model is sampled: ``sampled:PARENT?tokens=N&temperature=1&seed=17&batch_size=64`` and so on.

    Attributes:
        parent: A Hugging Face folder or name, a run of ours (its newest export), or a checkpoint with an export.
        tokens: Sampled in all, at least: whole batches.
        temperature: Divides the logits; 1 are the model's own probabilities.
        seed: Of all batches; each has its own by its number.
        batch_size: Documents that are sampled together; another one is another text.
        max_seq_len: Tokens that the model looks at. Default: as many as it can.
        max_tokens: Tokens at which a document is cut. Default: 16 times that.
    """

    model_config = ConfigDict(extra='forbid')

    parent: str
    tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 17
    batch_size: Annotated[int, Field(ge=1)] = 64
    max_seq_len: Annotated[int, Field(ge=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    @classmethod
    def parse(cls, target: str) -> 'Sampling':
        """Read what stands behind ``sampled:``.

        Raises:
            PrepareError: Naming what is wrong.
        """
        parent, _, query = target.partition('?')
        try:
            given = dict(parse_qsl(query, strict_parsing=True, keep_blank_values=True)) if query else {}
            numbers: dict[str, Any] = {key: _number(value) for key, value in given.items()}
            return parse_section(cls, {'parent': parent, **numbers})
        except ConfigError as error:
            raise PrepareError(f'sampled:{target}: {"; ".join(error.problems)}') from None
        except ValueError:
            raise PrepareError(f'sampled:{target}: expected options as name=value&name=value after the ?') from None

    def __str__(self) -> str:
        given = {key: value for key, value in self.model_dump(exclude={'parent'}).items() if value is not None}
        return f'{self.parent}?{urlencode(given)}'

    @property
    def folder(self) -> Path:
        """The model on this machine, fetched from the hub if need be.

        Raises:
            PrepareError: If there is none.
        """
        place = Path(self.parent)
        try:
            if place.is_dir() and not (place / '.metadata').exists():  # which a sharded checkpoint has
                return models_of(place)[0]
            if place.exists() or place.is_symlink():  # a checkpoint, monolithic or sharded
                batch = batch_of(os.path.realpath(place))  # latest-rank0.pt is a link to ep0-ba100-rank0.pt
                found = exports(place.parent)
                if batch not in found:
                    raise ValueError(f'the checkpoint has no export huggingface/ba{batch} beside it')
                return Path(found[batch])
            try:
                cached = folder_of_pretrained(self.parent)
                if any(file.suffix in WEIGHTS for file in cached.iterdir()):  # and not its tokenizer alone
                    return cached
            except ValueError:
                pass
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(self.parent))
        except (OSError, ValueError) as error:
            raise PrepareError(f'sampled:{self.parent}: {error}') from None


def _number(text: str) -> Any:
    try:
        return TypeAdapter(int | float).validate_python(text)
    except ValueError:
        return text


def model_hash(folder: Path) -> str:
    """A hash of a model's weights, configuration and tokenizer. Cost: reads them."""
    digest = hashlib.blake2b(digest_size=8)
    wanted = ('config.json', 'tokenizer.json', 'tokenizer_config.json')
    for file in sorted(folder.iterdir()):
        if file.suffix in WEIGHTS or file.name in wanted:
            digest.update(file.name.encode())
            with open(file, 'rb') as handle:
                while data := handle.read(1 << 24):
                    digest.update(data)
    return digest.hexdigest()


def sample(
    model: Any,
    start: Sequence[int],
    stops: Sequence[int],
    count: int,
    max_seq_len: int,
    temperature: float = 1.0,
    seed: int = 17,
    max_tokens: int | None = None,
) -> list[list[int]]:
    r"""Sample documents token by token, :math:`x_{t+1} \sim \mathrm{softmax}(z_t / \tau)`, nothing cut off.

    A document that fills the model's window goes on behind the second half of it, as in training, where rows begin
    anywhere in a document.

    Args:
        model: Of transformers.
        start: Tokens that every document begins with; they are not among those returned.
        stops: Tokens of which the first ends one, the last of those returned, unless it was cut.
        count: Documents.
        max_seq_len: Tokens of the window.
        temperature: :math:`\tau`. Default: ``1``.
        seed: Same seed and count, same tokens (on the same kind of device, with one thread). Default: ``17``.
        max_tokens: Where a document is cut, to the next half window. Default: ``None``, at ``max_seq_len``.
    """
    import torch
    from transformers.generation.configuration_utils import GenerationConfig

    how = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_length=max_seq_len, eos_token_id=list(stops),
        pad_token_id=stops[0], use_cache=True,
    )  # fmt: skip
    model.generation_config = how  # or the model's own would fill in what this leaves at its default
    documents: list[list[int]] = [[] for _ in range(count)]
    going_on, prompts = documents, torch.tensor([list(start)] * count, device=model.device)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == 'cuda' else []), torch.inference_mode():
        torch.manual_seed(seed)
        while going_on:
            rows = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=how)
            kept = []
            for number, (document, row) in enumerate(zip(going_on, rows[:, prompts.shape[1] :].tolist(), strict=True)):
                end = next((at for at, token in enumerate(row) if token in stops), None)
                document += row if end is None else row[: end + 1]
                if end is None and len(document) < (max_tokens or 0):
                    kept.append(number)
            going_on, prompts = [going_on[number] for number in kept], rows[kept, max_seq_len // 2 :]
    return documents


@dataclass(frozen=True)
class _Job:
    """A batch of documents, to be sampled into a file."""

    sampling: Sampling
    folder: str
    start: tuple[int, ...]
    stops: tuple[int, ...]
    number: int
    file: str


@lru_cache(1)
def _load(folder: str) -> tuple[Any, Any, int]:
    import torch
    from transformers.utils import logging

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu':
        torch.set_num_threads(1)  # sums in another order would be other numbers, and in the end other tokens
    logging.set_verbosity_error()  # it warns of prompts that end with the token that pads, and none is padded
    model, tokenizer, length = load_export(Path(folder), device)
    model.eval()
    reads = length or getattr(model.config, 'max_position_embeddings', None)
    return model, tokenizer, reads or getattr(model.config, 'n_positions', 0)


def _write(job: _Job) -> tuple[str, int]:
    """Sample a batch of documents, or find it done: its file, and its tokens."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file, of = Path(job.file), job.sampling
    if file.exists():
        return job.file, int((pq.read_metadata(file).metadata or {})[b'tokens'])
    try:
        model, tokenizer, reads = _load(job.folder)
    except ValueError as error:
        raise PrepareError(f'sampled:{of.parent}: {error}') from None
    length = min(filter(None, (of.max_seq_len, reads)), default=0)
    if not length:
        raise PrepareError(f'sampled:{of.parent}: its config.json has no sequence length; give max_seq_len')
    seed = int.from_bytes(hashlib.blake2b(f'{of.seed} {job.number}'.encode(), digest_size=8).digest()) >> 1
    most = of.max_tokens or 16 * length
    documents = sample(model, job.start, job.stops, of.batch_size, length, of.temperature, seed, most)
    # a special token would come back as its letters
    how = {'skip_special_tokens': True, 'clean_up_tokenization_spaces': False}
    texts = [tokenizer.decode(tokens[:-1] if tokens[-1] in job.stops else tokens, **how) for tokens in documents]
    schema = pa.schema({'text': pa.large_string(), 'problem': pa.string()})
    tokens = sum(map(len, documents))
    table = pa.table({'text': texts, 'problem': [None] * len(texts)}, schema=schema)
    partial = file.with_suffix(f'.{secrets.token_hex(4)}')  # Spark may try a task twice
    pq.write_table(table.replace_schema_metadata({'tokens': str(tokens)}), partial, compression='zstd')
    partial.replace(file)
    return job.file, tokens


def sampled_units(sampling: Sampling, spool: Path, engine: Any) -> Iterator[tuple[Unit, int]]:
    """The batches of documents of a model in order, each a file of its texts and its size.

    Each is a function of its number alone, so any engine and number of processes makes the same, and those that are
    there already are not made again. With a GPU, this process samples, on the first one.

    Args:
        sampling: What is wanted.
        spool: A folder for the files.
        engine: Of :mod:`~cpt_algorithms.preparation.engines`.

    Cost: a forward pass of one token for every token that is sampled, 2 FLOP for each parameter.
    """
    import torch
    from tqdm import tqdm

    folder = sampling.folder
    start, end = document_ends(load_tokenizer(str(folder), 'sampled'))
    spool = spool / model_hash(folder)
    spool.mkdir(parents=True, exist_ok=True)
    stops = tuple(dict.fromkeys([end[-1], *chain.from_iterable(stop_tokens(str(folder)).values())]))
    begin = tuple(start) or (end[-1],)  # rows are packed, so that what follows the end of a text begins one

    def jobs() -> Iterator[_Job]:
        for number in range(-(-sampling.tokens // sampling.batch_size)):  # each document has a token at least
            yield _Job(sampling, str(folder), begin, stops, number, str(spool / f'{number:06}.parquet'))

    results = (_write(job) for job in jobs()) if torch.cuda.is_available() else engine.map(_write, jobs())
    with tqdm(
        desc=f'sampling {sampling.parent}', total=sampling.tokens, unit='tok', unit_scale=True, disable=None
    ) as bar:
        done = 0
        for file, tokens in results:
            done += tokens
            bar.update(tokens)
            yield (file, 0, 1), Path(file).stat().st_size
            if done >= sampling.tokens:
                results.close()
                return
