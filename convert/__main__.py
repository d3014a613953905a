from lcconvert.convert.cli import main

main()
