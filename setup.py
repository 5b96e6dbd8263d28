# SPDX-License-Identifier: Apache-2.0
"""Installs ``cpt_algorithms``; the scripts in ``recipes/`` and ``scripts/`` run from a checkout."""

from pathlib import Path

from setuptools import find_packages, setup

# Every name a user's own llm-foundry YAML may use. llm-foundry reads these groups when it starts, and an
# entry point wins over a built-in of the same name: never reuse one of llm-foundry's names.
ENTRY_POINTS = {
    'llmfoundry_schedulers': [
        'rewarm_cosine = cpt_algorithms.schedulers.schedulers:RewarmCosineScheduler',
        'rewarm_constant = cpt_algorithms.schedulers.schedulers:RewarmConstantScheduler',
        'infinite = cpt_algorithms.schedulers.schedulers:InfiniteScheduler',
        'wsd = cpt_algorithms.schedulers.schedulers:WSDScheduler',
    ],
    'llmfoundry_dataloaders': [
        'replay_text = cpt_algorithms.replay.replay_text:build_replay_text_dataloader',
    ],
    'llmfoundry_callbacks': [
        'branch_points = cpt_algorithms.stage.branch_points:BranchPoints',
        'final_loss = cpt_algorithms.evaluation.final_loss:FinalLoss',
        'forgetting = cpt_algorithms.evaluation.forgetting:Forgetting',
        'ema = cpt_algorithms.weight_averaging.ema:EMA',
        'lawa = cpt_algorithms.weight_averaging.lawa:LAWA',
        'mask_documents = cpt_algorithms.replay.mask_documents:MaskDocuments',
    ],
    # llm-foundry loads each of these for every training, whatever its YAML names
    'llmfoundry_config_transforms': [
        'cpt_algorithms_compat = cpt_algorithms.compat:as_given',
    ],
    'llmfoundry_callbacks_with_config': [
        'stage_start = cpt_algorithms.stage.stage_start:StageStart',
    ],
    # what `stream_name` of a `text` dataset may say
    'streaming_streams_registry': [
        'resilient = cpt_algorithms.replay.streams:ResilientStream',
    ],
}

TEST = [
    'pytest>=8',
    'pytest-xdist>=3.6',
    'moto>=5',
    'flask>=3',
    'flask-cors>=5',
    'hypothesis>=6.100',
    'jsonschema>=4',
    'jsonref>=1',
    'mutmut>=3.8,<4',
    'pypdf>=5',
    'ruff>=0.9',
    'pyright[nodejs]>=1.1.390',
]

setup(
    name='cpt-algorithms',
    version='0.1.0',
    description='Continual pre-training recipes for Composer and LLM Foundry',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['cpt_algorithms', 'cpt_algorithms.*']),
    package_data={'cpt_algorithms': ['py.typed', '*/*.md', '*/*.jinja']},
    install_requires=[
        'llm-foundry>=0.22,<0.23',
        'mosaicml>=0.32.1,<0.33',
        'mosaicml-streaming>=0.12,<0.14',
        'lm-eval>=0.4.13,<0.5',
        'wandb>=0.18',
        'botocore',
        'datasketch>=2,<3',
        'filelock',
        'jinja2>=3',
        'matplotlib>=3.8',
        'numpy',
        'omegaconf>=2.3,<3',
        'orjson>=3',
        'psutil',
        'pyarrow',
        'pydantic>=2.10,<3',
        'regex',
        'rich>=13',
        'scipy',
        'setuptools<82',  # llm-foundry 0.22 imports pkg_resources, which later releases no longer have
        'submitit>=1.5.3,<2',
        'tenacity>=8',
        'tokenizers',
        'tqdm',
        'wrapt>=1.16',
        'xxhash>=3',
    ],
    extras_require={'test': TEST, 'spark': ['pyspark>=3.5,<4']},
    entry_points=ENTRY_POINTS,
)
