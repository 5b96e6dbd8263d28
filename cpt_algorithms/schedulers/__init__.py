# SPDX-License-Identifier: Apache-2.0
"""When and how fast: learning-rate schedules for runs that are continued."""
