# SPDX-License-Identifier: Apache-2.0
"""Results of runs: records, lineage, tables, plots, the page."""
