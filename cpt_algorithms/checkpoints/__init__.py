# SPDX-License-Identifier: Apache-2.0
"""What lies on disk: checkpoints, save folders and exports."""
