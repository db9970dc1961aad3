"""What one would write first: FastAPI, an ORM session a request; add, commit, refresh. Only for comparison.

It checks no key, keeps no ledger, and leaves nonce and personal_hash empty: all in its favour.
"""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from sqlalchemy import BigInteger, DateTime, Sequence, Text, create_engine
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

# As many connections as FastAPI has threads for its sync endpoints.
engine = create_engine(os.environ["DATABASE_URL"], pool_size=40, max_overflow=0)
new_session = sessionmaker(engine)
app = FastAPI()


class Base(DeclarativeBase):
    type_annotation_map = {str: Text, datetime: DateTime(timezone=True), dict[str, Any]: JSONB}  # noqa: RUF012 - SQLAlchemy's


class StoredEvent(Base):
    __tablename__ = "audit_events"

    id: Mapped[int] = mapped_column(BigInteger, Sequence("bench_ids"), primary_key=True)
    recorded_at: Mapped[datetime] = mapped_column(primary_key=True, default=lambda: datetime.now(UTC))
    event_type: Mapped[str]
    actor: Mapped[str]
    timestamp: Mapped[datetime]
    tenant: Mapped[str | None]
    resource: Mapped[str | None]
    outcome: Mapped[str | None]
    source: Mapped[str | None]
    details: Mapped[dict[str, Any] | None] = mapped_column("metadata")


class EventIn(BaseModel):
    event_type: str = Field(min_length=1, max_length=255)
    actor: str = Field(min_length=1, max_length=255)
    timestamp: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    tenant: str | None = None
    resource: str | None = None
    outcome: Literal["success", "failure", "denied", "unknown"] | None = None
    source: str | None = None
    details: dict[str, Any] | None = Field(None, alias="metadata")


class Event(EventIn):
    model_config = ConfigDict(from_attributes=True)

    id: int
    recorded_at: datetime
    details: dict[str, Any] | None = Field(None, validation_alias="details", serialization_alias="metadata")


def session() -> Iterator[Session]:
    with new_session() as opened:
        yield opened


@app.post("/events", status_code=201, response_model=Event)
def create_event(event: EventIn, session: Annotated[Session, Depends(session)]) -> StoredEvent:
    stored = StoredEvent(**event.model_dump())
    session.add(stored)
    session.commit()
    session.refresh(stored)
    return stored


@app.get("/health")
def health() -> None:
    """For the bench, which waits until it answers."""
