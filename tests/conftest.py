import os

# before torch is imported: tests run side by side, and another number of threads adds up in another order
os.environ['OMP_NUM_THREADS'] = '1'
