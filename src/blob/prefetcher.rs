//! Fetches chunks before a reader waits for them: ahead of a sequential reader, from a list, or all in the background.
//!
//! [`prefetch`] fetches missing units of a list, neighbouring units in one request. From the moment its request is
//! sent, a unit is in flight like any other, so that a reader waits for that unit and not for the whole request. A unit
//! that still waits for a permit is not in flight yet: a reader fetches it at once by itself.
//!
//! [`read_ahead`] decides when to prefetch for sequential readers, [`coalesce`] what a reader's own request fetches
//! besides.

use std::{
    collections::HashMap,
    iter::Peekable,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::task::JoinSet;

use super::{
    error::ReadCause,
    fetcher::{ChunkFetcher, SpanTransfer, UnitLeader},
    scheduler::{FetchPermit, MAX_PREFETCH_MEMORY, Priority},
    shared::FlightKey,
    span::{Span, SpanLimits},
    unit::{Unit, UnitId},
    unit_map::LoadedUnitMap,
};

pub(super) mod coalesce;
pub(super) mod read_ahead;
mod sequential_detector;

/// Limits of one prefetch request.
const LIMITS: SpanLimits = SpanLimits {
    len: 2 << 20,
    gap: 32 << 10,
    memory: MAX_PREFETCH_MEMORY,
};

/// Fetches those of the chunks at `positions` that are missing, neighbouring units in one request. Stops before the
/// next request once `cancelled` is set. Leaves units out that take more than [`MAX_PREFETCH_MEMORY`] bytes of memory.
///
/// # Errors
/// The first failure ends it. Corruption is none with [`Priority::Ahead`], since it may concern a single chunk.
pub(super) async fn prefetch(
    fetcher: &Arc<ChunkFetcher>,
    positions: &[usize],
    priority: Priority,
    cancelled: &AtomicBool,
) -> Result<(), ReadCause> {
    let is_missing = |position: &usize| fetcher.is_missing(*position);
    let missing: Vec<_> = positions.iter().copied().filter(is_missing).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let loaded = fetcher.unit_map().get().await?;
    let units = loaded.map.units(fetcher.layout(), &missing);
    let mut requests = JoinSet::new();
    for span in Span::group(units.map_err(|(_, error)| error)?, LIMITS) {
        if span.memory() as u64 > MAX_PREFETCH_MEMORY {
            continue;
        }
        let permit = fetcher.scheduler().acquire_prefetch(priority).await;
        if cancelled.load(Ordering::Relaxed) {
            break;
        }
        let (fetcher, loaded) = (Arc::clone(fetcher), Arc::clone(&loaded));
        requests.spawn(async move { fetch_units(&fetcher, &loaded, span.units, priority, permit).await });
        while let Some(done) = requests.try_join_next() {
            done.map_err(|_| ReadCause::Aborted)??;
        }
    }
    while let Some(done) = requests.join_next().await {
        done.map_err(|_| ReadCause::Aborted)??;
    }
    Ok(())
}

/// Fetches those of the units of a span that are still missing and not in flight.
async fn fetch_units(
    fetcher: &Arc<ChunkFetcher>,
    loaded: &Arc<LoadedUnitMap>,
    mut units: Vec<Unit>,
    priority: Priority,
    _permit: FetchPermit,
) -> Result<(), ReadCause> {
    // Readers may have fetched units, or started to, while this waited for its permit.
    let flights = fetcher.flights();
    units.retain(|unit| fetcher.is_any_missing(unit) && !flights.is_in_flight(&FlightKey::shared(unit.id)));
    let mut corruption = None;
    for span in Span::group(units, LIMITS) {
        let mut rest = span.units.into_iter().peekable();
        // Flights start with their request, so that no reader waits for an earlier request.
        while let Some((span, leaders)) = lead_adjacent(fetcher, &mut rest) {
            let transfer = SpanTransfer::new(Arc::clone(fetcher), Arc::clone(loaded), leaders, false);
            let taken = fetcher.scheduler().with_timeout(transfer.run(span)).await?;
            corruption = taken.map(|(cause, _)| cause).or(corruption);
        }
    }
    match corruption.filter(|_| priority == Priority::Background) {
        Some(cause) => Err(cause),
        None => Ok(()),
    }
}

/// Starts the flights of the next units that are still missing and not in flight, as long as they lie close together.
fn lead_adjacent(
    fetcher: &ChunkFetcher,
    units: &mut Peekable<impl Iterator<Item = Unit>>,
) -> Option<(Span, HashMap<UnitId, UnitLeader>)> {
    let (mut led, mut leaders) = (Vec::<Unit>::new(), HashMap::new());
    let is_near = |unit: &Unit, led: &[Unit]| {
        let start = unit.extent.compressed_offset;
        led.last()
            .is_none_or(|last| LIMITS.bridges(last.extent.compressed_end(), start))
    };
    while let Some(unit) = units.next_if(|unit| is_near(unit, &led)) {
        if let Some(leader) = fetcher.lead_if_missing(&unit) {
            leaders.insert(unit.id, leader);
            led.push(unit);
        }
    }
    // Units of one span that lie this close make one span again.
    let span = Span::group(led, LIMITS).into_iter().next()?;
    Some((span, leaders))
}

#[cfg(test)]
mod tests;
