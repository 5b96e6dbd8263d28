# SPDX-License-Identifier: Apache-2.0
"""Many stages: arms, seeds, branches, scales and sweeps."""
