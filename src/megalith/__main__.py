"""`python -m megalith` is `megalith`."""

from megalith.cli.main import main

if __name__ == "__main__":
    main()
