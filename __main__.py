# SPDX-License-Identifier: Apache-2.0
"""`python -m refound` is `refound`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="refound")
