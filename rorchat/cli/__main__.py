"""`python -m rorchat.cli ...`"""

from rorchat.cli import main

main()
