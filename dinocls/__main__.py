"`python -m dinocls` is the command `dinocls`, for launchers such as `accelerate launch -m dinocls`."
from dinocls.app.cli import main

if __name__ == '__main__': main()
