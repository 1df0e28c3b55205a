from pytq.cli import main

main(prog_name="pytq")
