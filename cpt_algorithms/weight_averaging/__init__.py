# SPDX-License-Identifier: Apache-2.0
"""Which weights to keep: exponential and latest-k averages of the trajectory, online and from any checkpoint."""
