"""The program that every rank runs, and the files through which a backend and its ranks communicate."""
