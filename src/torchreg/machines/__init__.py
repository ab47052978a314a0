"""What each machine needs and how each launcher spells it: data and pure functions.

`known_machines`: devices, CPU binding and variables of each machine. `launch_commands`: the command line of each
launcher, and which launcher and hosts this job has.
"""
