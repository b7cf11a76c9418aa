"""``lorasuite``'s command line, with the transforms of this package."""

from benchmarks.plugins import register_plugins
from flows.command_line import main

if __name__ == "__main__":
    register_plugins()
    main()
