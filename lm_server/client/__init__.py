"""Clients of language-model servers and workers. They need numpy and redis only."""

from lm_server.client.client import Client as Client
from lm_server.client.jobs import JobClient as JobClient
