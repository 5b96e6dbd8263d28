# SPDX-License-Identifier: Apache-2.0
"""Measurements inside a run: forgetting and adaptation."""
