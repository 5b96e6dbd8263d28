# SPDX-License-Identifier: Apache-2.0
"""New data with a little old data in every batch."""
