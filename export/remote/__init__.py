# SPDX-License-Identifier: Apache-2.0
"""Modelling code that is copied beside an exported model. It imports transformers and torch, never refound."""
