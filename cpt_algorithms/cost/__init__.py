# SPDX-License-Identifier: Apache-2.0
"""The cost of a run, before it is paid for."""
