"""The Slurm backend: submit, adopt, follow, retry, and what runs inside a job."""
