# SPDX-License-Identifier: Apache-2.0
"""What a run will cost, before it is paid for."""
