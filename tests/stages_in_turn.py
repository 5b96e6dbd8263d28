# SPDX-License-Identifier: Apache-2.0
"""Run by tests under the composer launcher: the stages of several YAMLs, one after another in the same processes."""

import sys

import continue_pretraining
import tiny  # noqa: F401 - what the stages would do again each is done once

if __name__ == '__main__':
    for yaml in sys.argv[1:]:
        sys.argv = ['continue_pretraining.py', yaml]
        continue_pretraining.main()
