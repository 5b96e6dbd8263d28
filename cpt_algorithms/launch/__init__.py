# SPDX-License-Identifier: Apache-2.0
"""Processes here, Slurm jobs, printed commands."""
