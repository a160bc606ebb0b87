"""The Slurm backend: submitting, adopting, following and retrying jobs, and the code that runs inside a job."""
