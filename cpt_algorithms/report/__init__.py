# SPDX-License-Identifier: Apache-2.0
"""What runs have come to: records, lineage, tables, plots, the page."""
