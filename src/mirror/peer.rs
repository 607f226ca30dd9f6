//! Who is at the other end of a connection.
//!
//! The mirror reads with the credentials of the host's root, so it must not read for just anyone on the host. For a
//! connection over loopback the kernel's table of sockets has the other end too, with the user who made it.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use axum::{extract::connect_info::Connected, serve::IncomingStream};
use tokio::{net::TcpListener, sync::OnceCell};

/// The kernel's tables of sockets: a connection over IPv4 may be made by a socket of either kind.
const TABLES: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];
/// The state of a connection that both ends have open. Once a process has closed its end, the kernel may show it as
/// root's.
const ESTABLISHED: &str = "01";
/// The state of a socket that takes connections.
const LISTENING: &str = "0A";

/// The other end of a connection.
#[derive(Clone)]
pub struct Peer {
    remote: SocketAddr,
    /// Our end.
    local: Option<SocketAddr>,
    /// Looked up once for each connection.
    uid: Arc<OnceCell<Option<u32>>>,
}

impl Connected<IncomingStream<'_, TcpListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        Self {
            remote: *stream.remote_addr(),
            local: stream.io().local_addr().ok(),
            uid: Arc::default(),
        }
    }
}

impl Peer {
    /// The user who made the connection; `None` if that cannot be told. `judge` sees it the first time.
    pub async fn uid(&self, judge: impl FnOnce(Option<u32>)) -> Option<u32> {
        let look_up = || async {
            let (remote, local) = (self.remote, self.local);
            // The table may be long.
            let found = tokio::task::spawn_blocking(move || owner(remote, local?)).await;
            let uid = found.ok().flatten();
            judge(uid);
            uid
        };
        *self.uid.get_or_init(look_up).await
    }
}

/// The owner of the socket that is at `its_end` and connected to `our_end`.
fn owner(its_end: SocketAddr, our_end: SocketAddr) -> Option<u32> {
    TABLES
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .find_map(|table| owner_in(&table, its_end, our_end))
}

/// The same in the text of a table.
fn owner_in(table: &str, its_end: SocketAddr, our_end: SocketAddr) -> Option<u32> {
    let (its_forms, our_forms) = (forms(its_end), forms(our_end));
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
        let matches = state == ESTABLISHED
            && its_forms.iter().any(|form| form == local)
            && our_forms.iter().any(|form| form == remote);
        // Left out: queues, timer and retransmissions.
        matches.then(|| fields.nth(3)?.parse().ok()).flatten()
    })
}

/// The user whose socket takes the connections to `address` on this host; `None` if there is none, or it cannot be told.
pub fn listener_uid(address: SocketAddr) -> Option<u32> {
    let tables = TABLES.iter().filter_map(|table| fs::read_to_string(table).ok());
    listener_in(&tables.collect::<String>(), address)
}

/// The same in the text of the tables.
fn listener_in(tables: &str, address: SocketAddr) -> Option<u32> {
    let port = address.port();
    // Who connects to any address gets to loopback.
    let own = match address.ip().to_canonical() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    // The socket of the very address goes before one of all addresses, and that for IPv4 alone before one for both.
    let mut places = forms((own, port).into());
    if own.is_ipv4() {
        places.extend(forms((Ipv4Addr::UNSPECIFIED, port).into()));
    }
    places.extend(forms((Ipv6Addr::UNSPECIFIED, port).into()));
    let listening = |place: &String| {
        tables.lines().find_map(|line| {
            let mut fields = line.split_ascii_whitespace().skip(1);
            let (local, _, state) = (fields.next()?, fields.next()?, fields.next()?);
            let matches = state == LISTENING && local == place;
            matches.then(|| fields.nth(3)?.parse().ok()).flatten()
        })
    };
    places.iter().find_map(listening)
}

/// An address as the tables for IPv4 and for IPv6 write it.
fn forms(address: SocketAddr) -> Vec<String> {
    let port = address.port();
    // The kernel prints each word of 32 bits in the machine's order.
    let words = |octets: &[u8]| -> String {
        octets
            .chunks_exact(4)
            .map(|word| format!("{:08X}", u32::from_ne_bytes([word[0], word[1], word[2], word[3]])))
            .collect()
    };
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => {
            let mapped = ip.to_ipv6_mapped().octets();
            vec![
                format!("{}:{port:04X}", words(&ip.octets())),
                format!("{}:{port:04X}", words(&mapped)),
            ]
        }
        IpAddr::V6(ip) => vec![format!("{}:{port:04X}", words(&ip.octets()))],
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    const HEADER: &str =
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

    fn table(lines: &[&str]) -> String {
        HEADER.to_owned() + &lines.join("\n")
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn tables_are_read() {
        let (its, ours) = ("127.0.0.1:40000".parse().unwrap(), "127.0.0.1:5055".parse().unwrap());
        let listening =
            "   0: 0100007F:13BF 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 x";
        let our_end =
            "   1: 0100007F:13BF 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 2 1 x";
        let its_end =
            "   2: 0100007F:9C40 0100007F:13BF 01 00000000:00000000 00:00000000 00000000  1000        0 3 1 x";
        assert_eq!(owner_in(&table(&[listening, our_end, its_end]), its, ours), Some(1000));
        assert_eq!(owner_in(&table(&[listening, our_end]), its, ours), None);
        // Closed by its owner, and now shown as root's.
        let closed = its_end.replace(" 01 ", " 05 ").replace("  1000 ", "     0 ");
        assert_eq!(owner_in(&table(&[&closed]), its, ours), None);
        let mapped = its_end
            .replace("0100007F:9C40", "0000000000000000FFFF00000100007F:9C40")
            .replace("0100007F:13BF", "0000000000000000FFFF00000100007F:13BF");
        assert_eq!(owner_in(&table(&[&mapped]), its, ours), Some(1000));
        for damaged in [
            "",
            "x",
            "2: 0100007F:9C40 0100007F:13BF 01",
            &its_end.replace("1000", "-1"),
        ] {
            assert_eq!(owner_in(&table(&[damaged]), its, ours), None, "{damaged}");
        }
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn listeners_are_found() {
        let line = |local: &str, state, uid| {
            format!("   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 {uid:5}        0 1 1 x")
        };
        let (own, all) = (line("0100007F:13BF", "0A", 1), line("00000000:13BF", "0A", 2));
        let both = line("00000000000000000000000000000000:13BF", "0A", 3);
        let mapped = line("0000000000000000FFFF00000100007F:13BF", "0A", 4);
        let others = [
            line("0100007F:13C0", "0A", 5),
            line("0200007F:13BF", "0A", 5),
            line("0100007F:13BF", "01", 5),
            "   0: 0100007F:13BF 00000000:0000 0A".to_owned(),
        ];
        let others = others.each_ref().map(String::as_str);
        for (lines, expected) in [
            (vec![], None),
            (vec![&*both, &*all, &*mapped, &*own], Some(1)),
            (vec![&*both, &*all, &*mapped], Some(4)),
            (vec![&*both, &*all], Some(2)),
            (vec![&*both], Some(3)),
        ] {
            let tables = table(&[&others[..], &lines].concat());
            for address in ["127.0.0.1:5055", "0.0.0.0:5055"] {
                assert_eq!(
                    listener_in(&tables, address.parse().unwrap()),
                    expected,
                    "{address} {tables}"
                );
            }
        }
        assert_eq!(listener_in(&table(&[&*all]), "[::1]:5055".parse().unwrap()), None);
    }

    #[test]
    fn this_process_owns_its_listeners() {
        for place in ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"] {
            let Ok(listener) = TcpListener::bind(place) else {
                continue;
            };
            let mut address = listener.local_addr().unwrap();
            let uid = Some(rustix::process::geteuid().as_raw());
            assert_eq!(listener_uid(address), uid, "{place}");
            if place != "[::1]:0" {
                address.set_ip(Ipv4Addr::LOCALHOST.into());
                assert_eq!(listener_uid(address), uid, "{place}");
            }
        }
    }

    #[test]
    fn this_process_owns_its_connections() {
        for place in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(place) else {
                continue;
            };
            let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            let uid = owner(stream.local_addr().unwrap(), accepted.local_addr().unwrap());
            assert_eq!(uid, Some(rustix::process::geteuid().as_raw()), "{place}");
        }
    }
}
