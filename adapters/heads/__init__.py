# SPDX-License-Identifier: Apache-2.0
"""What guesses a model's next tokens, so that it checks several in one pass: heads, drafts, early exits."""
