//! Which controllers are alive, so that what a dead one left half done can be told from what a living one is doing.
//!
//! On PostgreSQL each controller has a connection of its own that holds an advisory lock with the controller's number; the
//! server lets go of it when the controller ends, however it ends. On SQLite there is one controller: every other number
//! is a dead one's.

use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};

use super::{Conn, driver};

/// First key of the advisory locks, "mote"; the second is the controller's number.
const CLASS: i32 = 1_836_020_837;

/// This controller among the living.
#[derive(Debug)]
pub struct Presence {
    /// The controller's number, random at each start.
    pub number: i32,
    /// Holds the lock.
    _connection: Option<tokio::sync::Mutex<PgConnection>>,
}

impl Presence {
    /// Takes a number and shows it as long as this value lives.
    ///
    /// # Errors
    /// Of the database.
    pub async fn announce(postgres: Option<&PgConnectOptions>) -> Result<Self, sqlx::Error> {
        let number = uuid::Uuid::new_v4().as_fields().0.cast_signed();
        let Some(options) = postgres else { return Ok(Self { number, _connection: None }) };
        let mut connection = PgConnection::connect_with(options).await?;
        sqlx::query("SELECT pg_advisory_lock($1, $2)")
            .bind(CLASS)
            .bind(number)
            .execute(&mut connection)
            .await?;
        Ok(Self { number, _connection: Some(tokio::sync::Mutex::new(connection)) })
    }

    /// Whether the controller with this number is alive.
    ///
    /// # Errors
    /// Of the database.
    pub async fn is_alive(&self, conn: &mut Conn, number: i32) -> Result<bool, sqlx::Error> {
        let driver::Conn::Postgres(conn) = conn else { return Ok(number == self.number) };
        // Let go with the transaction; a living controller's lock can't be had, not even shared.
        let free: bool = sqlx::query_scalar("SELECT pg_try_advisory_xact_lock_shared($1, $2)")
            .bind(CLASS)
            .bind(number)
            .fetch_one(&mut **conn)
            .await?;
        Ok(!free)
    }
}
