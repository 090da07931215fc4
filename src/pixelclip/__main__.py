"""Entry point of `pixelclip` and of `python -m pixelclip`."""

from pixelclip.cli import main

if __name__ == "__main__":
    main()
