# SPDX-License-Identifier: Apache-2.0
"""What a run will give, before it is paid for."""
