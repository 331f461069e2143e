"What holds for all tests: weights that they save themselves, as pickles too, are trusted."
import os

os.environ.setdefault('MEDSYN_TRUST_PICKLE', '1')
