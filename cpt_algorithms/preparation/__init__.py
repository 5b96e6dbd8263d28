# SPDX-License-Identifier: Apache-2.0
"""From text to datasets that stages can read."""
