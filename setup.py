"""The packages to install; everything else stands in setup.cfg.

The configurations lie in configs/, for all to see, and are installed as `b2txt_jax.configs`.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["b2txt_jax*", "lm_server*"]), "b2txt_jax.configs"],
    package_dir={"b2txt_jax.configs": "configs"},
)
