"""What routes ask for, as Annotated aliases; the objects behind them are made once, in `app.py`."""

from typing import Annotated

from fastapi import Depends, Request

from service.jobs import JobStore
from service.models import Models
from service.settings import Settings
from service.views import JobReader


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _store(request: Request) -> JobStore:
    store: JobStore = request.app.state.store
    return store


def _reader(request: Request) -> JobReader:
    reader: JobReader = request.app.state.reader
    return reader


def _models(request: Request) -> Models:
    models: Models = request.app.state.models
    return models


SettingsDep = Annotated[Settings, Depends(_settings)]
StoreDep = Annotated[JobStore, Depends(_store)]  # blocks: for `def` code, in a thread
ReaderDep = Annotated[JobReader, Depends(_reader)]
ModelsDep = Annotated[Models, Depends(_models)]  # reads files: for `def` code, in a thread
