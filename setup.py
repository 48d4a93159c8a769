"""Finds the packages: kernels/ and bench/ lie beside tritondeq/ and install inside it."""

from setuptools import find_packages, setup

FOLDERS = {"tritondeq": "tritondeq", "tritondeq.kernels": "kernels", "tritondeq.bench": "bench"}

setup(
    package_dir=FOLDERS,
    packages=[
        *FOLDERS,
        *(f"{package}.{below}" for package, folder in FOLDERS.items() for below in find_packages(folder)),
    ],
)
