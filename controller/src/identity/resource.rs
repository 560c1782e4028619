//! What the kinds of things in identity have in common: they are listed, shown and deleted alike. A kind says in [`Resource`]
//! which rows it consists of and how one is shown; the handlers here do the rest. How something is made and changed is its
//! kind's own.

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::MethodRouter,
};
use http::StatusCode;
use serde_json::{Value, json};
use sqlx::{Database, FromRow, QueryBuilder};

use super::{MAX_LIST, begin, not_found};
use crate::{
    app::App,
    db::{Conn, Db},
    http::{context::Ctx, error::ApiError, query::Params},
    policy,
};

/// A statement that grows.
pub(super) type Query = QueryBuilder<Db>;

/// Names of parameters.
pub(super) type Filters = &'static [&'static str];

/// A kind of thing: a row of it.
pub(super) trait Resource:
    for<'r> FromRow<'r, <Db as Database>::Row> + Send + Sync + Unpin + 'static
{
    /// Member of a document of one, with `_` for blanks in messages.
    const NAME: &'static str;
    /// Of all; its last part is the member of a list.
    const PATH: &'static str;
    /// Where its rows are.
    const TABLE: &'static str;
    /// What is read of them.
    const COLUMNS: &'static str = "*";
    /// Where it is read from.
    const FROM: &'static str = Self::TABLE;
    /// The id's column there.
    const ID: &'static str = "id";
    /// Parameters that choose from a list.
    const FILTERS: Filters;
    /// Columns by which lists are sorted.
    const ORDER: &'static str;
    /// Whether tokens or catalogs can be others without one.
    const MATTERS: bool = true;

    /// As Keystone shows it.
    fn shown(&self, app: &App) -> Result<Value, ApiError>;

    /// The condition of what somebody sees who doesn't see all.
    fn push_own(query: &mut Query, _ctx: &Ctx) {
        query.push("TRUE");
    }

    /// The column that a parameter chooses by.
    fn column(parameter: &'static str) -> &'static str {
        parameter
    }

    /// What a condition can't say.
    fn is_for(&self, _app: &App, _ctx: &Ctx) -> Result<bool, ApiError> {
        Ok(true)
    }

    /// Whether a list is empty whatever there is.
    fn is_none(_params: &Params) -> bool {
        false
    }

    /// What has to be before one goes; what goes with it.
    fn before_delete(&self, _conn: &mut Conn) -> impl Future<Output = Result<(), ApiError>> + Send {
        async { Ok(()) }
    }
}

/// The routes of a kind: `all` has how one is made, `one` how it is changed.
pub(super) fn routes<R: Resource>(all: MethodRouter<App>, one: MethodRouter<App>) -> Router<App> {
    Router::new()
        .route(R::PATH, all.get(list::<R>))
        .route(&format!("{}/{{id}}", R::PATH), one.get(show::<R>).delete(delete::<R>))
}

/// The beginning of a statement, up to `WHERE`.
fn from<R: Resource>() -> Query {
    let mut query = Query::new("SELECT ");
    query.push(R::COLUMNS).push(" FROM ").push(R::FROM).push(" WHERE ");
    query
}

/// The beginning of a statement about what the asker sees.
fn select<R: Resource>(ctx: &Ctx, sees_all: bool) -> Query {
    let mut query = from::<R>();
    match sees_all {
        true => drop(query.push("TRUE")),
        false => R::push_own(&mut query, ctx),
    }
    query
}

fn unknown<R: Resource>(id: &str) -> ApiError {
    not_found(&R::NAME.replace('_', " "), id)
}

/// One, whoever asks.
///
/// # Errors
/// 404.
pub(super) async fn find<R: Resource>(conn: &mut Conn, id: &str) -> Result<R, ApiError> {
    let mut query = from::<R>();
    query.push(R::ID).push(" = ").push_bind(id.to_owned());
    query.build_query_as().fetch_optional(conn).await?.ok_or_else(|| unknown::<R>(id))
}

/// One, if the asker sees it: others don't exist.
///
/// # Errors
/// 404.
pub(super) async fn find_for<R: Resource>(
    app: &App,
    conn: &mut Conn,
    (ctx, sees_all): (&Ctx, bool),
    id: &str,
) -> Result<R, ApiError> {
    let mut query = select::<R>(ctx, sees_all);
    query.push(" AND ").push(R::ID).push(" = ").push_bind(id.to_owned());
    let row: Option<R> = query.build_query_as().fetch_optional(conn).await?;
    match row {
        Some(row) if row.is_for(app, ctx)? => Ok(row),
        _ => Err(unknown::<R>(id)),
    }
}

async fn list<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let mut query = select::<R>(&ctx, policy::may_read(&ctx));
    if R::is_none(&params) {
        query.push(" AND FALSE");
    }
    for name in R::FILTERS {
        if let Some(value) = params.get(name) {
            query.push(" AND ").push(R::column(name)).push(" = ").push_bind(value.to_owned());
        }
    }
    query.push(" ORDER BY ").push(R::ORDER).push(" LIMIT ").push_bind(MAX_LIST + 1);
    let rows: Vec<R> = query.build_query_as().fetch_all(&app.db).await?;
    let mut items = Vec::with_capacity(rows.len());
    for row in rows {
        if row.is_for(&app, &ctx)? {
            items.push(row.shown(&app)?);
        }
    }
    let plural = R::PATH.rsplit('/').next().unwrap_or(R::PATH);
    Ok(Json(super::list(&app, plural, R::PATH, items)))
}

async fn show<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let row: R = find_for(&app, &mut conn, (&ctx, policy::may_read(&ctx)), &id).await?;
    Ok(Json(json!({ R::NAME: row.shown(&app)? })))
}

async fn delete<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    let mut tx = match R::MATTERS {
        true => begin(&app).await?,
        false => app.begin().await?,
    };
    let row: R = find_for(&app, &mut tx, (&ctx, ctx.is_admin), &id).await?;
    row.before_delete(&mut tx).await?;
    let mut query = Query::new("DELETE FROM ");
    query.push(R::TABLE).push(" WHERE id = ").push_bind(id);
    query.build().execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}
