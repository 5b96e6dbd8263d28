# SPDX-License-Identifier: Apache-2.0
"""One stage: what its YAML says, whether all is there, how it starts and runs."""
