//! Models a network link: a TCP proxy to one address with a delay and a rate limit.

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, tcp},
    runtime::Runtime,
    sync::mpsc,
    time::{sleep, sleep_until},
};

/// Bytes of one read.
const READ_BYTES: usize = 32 << 10;
/// Pieces in flight in one direction of a connection: about 4 MiB, like a kernel's buffers.
const MAX_PIECES_IN_FLIGHT: usize = 128;

/// Precision of timers.
const TIMER_PRECISION: Duration = Duration::from_millis(1);
/// How late a piece may reach the link and still count as in time. Timers fire late and the proxy waits for a core,
/// during which a real link would not be idle. An idle link passes this much at once.
const MAX_LATENESS: Duration = Duration::from_millis(4);

/// Speed of a link.
#[derive(Debug, Clone, Copy)]
pub struct Speed {
    /// Round-trip time.
    pub round_trip: Duration,
    /// Rate towards the client, of all connections together.
    pub bytes_per_second: f64,
}

/// An active link. It ends when dropped.
pub struct Link {
    pub addr: SocketAddr,
    _runtime: Runtime,
}

/// The time until which the link is busy with queued data.
type BusyUntil = Arc<Mutex<Instant>>;

impl Link {
    /// Opens a link to `target`.
    pub fn open(target: SocketAddr, speed: Speed) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let busy: BusyUntil = Arc::new(Mutex::new(Instant::now()));
        runtime.spawn(async move {
            let Ok(listener) = tokio::net::TcpListener::from_std(listener) else {
                return;
            };
            while let Ok((near, _)) = listener.accept().await {
                let busy = Arc::clone(&busy);
                tokio::spawn(async move {
                    // Delay of the TCP handshake.
                    sleep(speed.round_trip).await;
                    let Ok(far) = TcpStream::connect(target).await else {
                        return;
                    };
                    near.set_nodelay(true).ok();
                    far.set_nodelay(true).ok();
                    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                    tokio::join!(
                        pass(near_in, far_out, speed, None),
                        pass(far_in, near_out, speed, Some(busy))
                    );
                });
            }
        });
        Ok(Self {
            addr,
            _runtime: runtime,
        })
    }
}

/// Sleeps until a time, unless it is closer than [`TIMER_PRECISION`], as between pieces of a fast link.
async fn wait_until(due: Instant) {
    if due > Instant::now() + TIMER_PRECISION {
        sleep_until(due.into()).await;
    }
}

/// Forwards bytes with a delay of half a round trip, and at the link's rate if `busy` is given.
async fn pass(mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf, speed: Speed, busy: Option<BusyUntil>) {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(MAX_PIECES_IN_FLIGHT);
    let read = async move {
        let mut piece = vec![0; READ_BYTES];
        while let Ok(len @ 1..) = from.read(&mut piece).await {
            let mut sent = Instant::now();
            if let Some(busy) = &busy {
                let mut until = busy.lock();
                let begun = until.max(sent.checked_sub(MAX_LATENESS).unwrap_or(sent));
                sent = begun + Duration::from_secs_f64(len as f64 / speed.bytes_per_second);
                *until = sent;
            }
            // Waits until the link has sent this piece before taking the next.
            wait_until(sent).await;
            if sender
                .send((sent + speed.round_trip / 2, piece[..len].to_vec()))
                .await
                .is_err()
            {
                break;
            }
        }
    };
    let write = async move {
        while let Some((due, piece)) = receiver.recv().await {
            wait_until(due).await;
            if to.write_all(&piece).await.is_err() {
                break;
            }
        }
        to.shutdown().await.ok();
    };
    tokio::join!(read, write);
}
