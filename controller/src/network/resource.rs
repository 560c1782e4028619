//! What all resources have in common: the five calls, several in one request, pages, fields, tags, and the hosts that hear
//! of a change.
//!
//! A kind of resource says in [`Resource`] how it is read and changed; the handlers here do the rest. A request is one
//! transaction ([`Change`]): rows, quotas, addresses, and the generations of the hosts whose desired state follows.

use std::collections::{BTreeSet, HashMap};

use axum::{
    Json, Router,
    extract::{Path, Query as Params, State},
    routing::get,
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{
    Id, Scope,
    attributes::{Attributes, New, invalid_input},
    base,
    listing::{Collection, Query},
    revision::IfMatch,
};
use crate::{
    app::App,
    db::{Conn, Tx},
    hosts,
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// Neutron's limits (`MAX_TAGS_COUNT`, `MAX_TAG_LEN`).
const MAX_TAGS: usize = 50;
const MAX_TAG: usize = 255;

type Pairs = Params<Vec<(String, String)>>;

/// A kind of resource.
pub(super) trait Resource: Send + Sync + 'static {
    /// `security_group`.
    const NAME: &'static str;
    /// `security-groups`, the last part of the path.
    const PATH: &'static str;
    /// Its documents.
    const COLLECTION: Collection;

    /// Neutron's 404.
    fn missing(id: &str) -> ApiError;

    /// What must be there before an asker reads.
    fn prepare(_app: &App, _scope: &Scope) -> impl Future<Output = Result<(), ApiError>> + Send {
        async { Ok(()) }
    }

    /// The documents that the asker may see, at least those that the query asks for.
    fn read(
        db: &mut Conn,
        scope: &Scope,
        query: &Query,
    ) -> impl Future<Output = Result<Vec<Value>, ApiError>> + Send;

    /// Makes one; gives its id.
    fn create(change: &mut Change, body: Attributes)
    -> impl Future<Output = Result<String, ApiError>> + Send;

    /// Changes one that the asker may see.
    fn update(
        change: &mut Change,
        id: &str,
        body: Attributes,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;

    /// Removes one that the asker may see.
    fn delete(change: &mut Change, id: &str) -> impl Future<Output = Result<(), ApiError>> + Send;
}

/// A request that writes.
pub(super) struct Change {
    /// Its transaction.
    pub(super) tx: Tx,
    /// Whose it is.
    pub(super) scope: Scope,
    concerned: BTreeSet<String>,
}

impl Change {
    /// Begins the transaction.
    pub(super) async fn begin(app: &App, scope: Scope) -> Result<Self, ApiError> {
        Ok(Self { tx: app.begin().await?, scope, concerned: BTreeSet::new() })
    }

    /// These hosts' desired state changes. To be said before rows go by which the hosts are found, or after rows come.
    pub(super) fn concern(&mut self, hosts: impl IntoIterator<Item = String>) {
        self.concerned.extend(hosts);
    }

    /// Gives each host that is concerned one new generation, commits, and wakes them.
    pub(super) async fn commit(mut self, app: &App) -> Result<(), ApiError> {
        let touched = hosts::touch_all(&mut self.tx, &self.concerned).await?;
        self.tx.commit().await?;
        app.hub.wake_all(touched);
        Ok(())
    }
}

/// The routes of a kind.
pub(super) fn routes<R: Resource>() -> Router<App> {
    let all = format!("/v2.0/{}", R::PATH);
    let routes = Router::new()
        .route(&all, get(list::<R>).post(create::<R>))
        .route(&format!("{all}/{{id}}"), get(show::<R>).put(update::<R>).delete(delete::<R>));
    match R::COLLECTION.attributes.contains(&"tags") {
        false => routes,
        true => routes
            .route(
                &format!("{all}/{{id}}/tags"),
                get(tags::<R>).put(replace_tags::<R>).delete(remove_tags::<R>),
            )
            .route(
                &format!("{all}/{{id}}/tags/{{tag}}"),
                get(tag::<R>).put(add_tag::<R>).delete(remove_tag::<R>),
            ),
    }
}

/// The routes of a kind whose resources are below those of another: `parent` is `/v2.0/floatingips`.
pub(super) fn routes_below<R: Resource>(parent: &str) -> Router<App> {
    let all = format!("{parent}/{{parent}}/{}", R::PATH);
    Router::new().route(&all, get(list_below::<R>).post(create_below::<R>)).route(
        &format!("{all}/{{id}}"),
        get(show_below::<R>).put(update_below::<R>).delete(delete_below::<R>),
    )
}

/// The documents with their tags.
async fn documents<R: Resource>(db: &mut Conn, scope: &Scope, query: &Query) -> Result<Vec<Value>, ApiError> {
    let mut documents = R::read(db, scope, query).await?;
    if !R::COLLECTION.attributes.contains(&"tags") {
        return Ok(documents);
    }
    let stored: Vec<(String, String)> = match query.values("id") {
        Some([id]) => {
            sqlx::query_as("SELECT resource_id, tag FROM network_tags WHERE resource_id = $1 ORDER BY tag")
                .bind(id)
                .fetch_all(db)
                .await?
        }
        _ => {
            sqlx::query_as("SELECT resource_id, tag FROM network_tags WHERE collection = $1 ORDER BY tag")
                .bind(R::COLLECTION.name)
                .fetch_all(db)
                .await?
        }
    };
    let mut tags: HashMap<String, Vec<String>> = HashMap::new();
    for (id, tag) in stored {
        tags.entry(id).or_default().push(tag);
    }
    for document in &mut documents {
        let own = document["id"].as_str().and_then(|id| tags.remove(id));
        document["tags"] = json!(own.unwrap_or_default());
    }
    Ok(documents)
}

/// One document, if the asker may see it.
pub(super) async fn document<R: Resource>(
    db: &mut Conn,
    scope: &Scope,
    id: &str,
    fields: &Query,
) -> Result<Value, ApiError> {
    let found = documents::<R>(db, scope, &Query::of_id(id, fields)).await?;
    let mut found = found.into_iter().find(|document| document["id"] == *id).ok_or_else(|| R::missing(id))?;
    fields.pick(&mut found);
    Ok(found)
}

async fn list_of<R: Resource>(
    app: App,
    scope: Scope,
    pairs: Vec<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let query = Query::parse(pairs, R::COLLECTION)?;
    R::prepare(&app, &scope).await?;
    let documents = documents::<R>(&mut *app.db.acquire().await?, &scope, &query).await?;
    query.answer(documents, R::COLLECTION, &format!("{}/{}", base(&app), R::PATH)).map(Json)
}

async fn show_of<R: Resource>(
    app: App,
    scope: Scope,
    id: String,
    pairs: Vec<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let query = Query::parse(pairs, R::COLLECTION)?;
    let mut db = app.db.acquire().await?;
    let document = document::<R>(&mut db, &scope, &id, &query).await?;
    Ok(Json(json!({ R::NAME: document })))
}

async fn create_of<R: Resource>(
    app: App,
    scope: Scope,
    body: Value,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let new = Attributes::open_new(body, R::NAME, R::COLLECTION.name)?;
    let mut change = Change::begin(&app, scope).await?;
    let answer = match new {
        New::One(body) => json!({ R::NAME: create_one::<R>(&mut change, body).await? }),
        New::Several(bodies) => {
            let mut documents = Vec::with_capacity(bodies.len());
            for body in bodies {
                documents.push(create_one::<R>(&mut change, body).await?);
            }
            json!({ R::COLLECTION.name: documents })
        }
    };
    change.commit(&app).await?;
    Ok((StatusCode::CREATED, Json(answer)))
}

async fn create_one<R: Resource>(change: &mut Change, mut body: Attributes) -> Result<Value, ApiError> {
    let tags = match R::COLLECTION.attributes.contains(&"tags") {
        true => body.list("tags")?.map(|list| checked_tags(&list)).transpose()?,
        false => None,
    };
    let id = R::create(change, body).await?;
    write_tags::<R>(&mut change.tx, &id, &tags.unwrap_or_default()).await?;
    document::<R>(&mut change.tx, &change.scope, &id, &Query::default()).await
}

async fn update_of<R: Resource>(
    app: App,
    scope: Scope,
    (id, revision): (String, IfMatch),
    body: Value,
) -> Result<Json<Value>, ApiError> {
    let body = Attributes::open(body, R::NAME)?;
    let mut change = Change::begin(&app, scope).await?;
    revision.check::<R>(&mut change, &id).await?;
    R::update(&mut change, &id, body).await?;
    let document = document::<R>(&mut change.tx, &change.scope, &id, &Query::default()).await?;
    change.commit(&app).await?;
    Ok(Json(json!({ R::NAME: document })))
}

async fn delete_of<R: Resource>(
    app: App,
    scope: Scope,
    (id, revision): (String, IfMatch),
) -> Result<StatusCode, ApiError> {
    let mut change = Change::begin(&app, scope).await?;
    revision.check::<R>(&mut change, &id).await?;
    R::delete(&mut change, &id).await?;
    forget_tags(&mut change.tx, &id).await?;
    change.commit(&app).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn list<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Params(pairs): Pairs,
) -> Result<Json<Value>, ApiError> {
    list_of::<R>(app, Scope::reading(&ctx)?, pairs).await
}

async fn show<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    Params(pairs): Pairs,
) -> Result<Json<Value>, ApiError> {
    show_of::<R>(app, Scope::reading(&ctx)?, id, pairs).await
}

async fn create<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    create_of::<R>(app, Scope::writing(&ctx)?, body).await
}

async fn update<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    revision: IfMatch,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    update_of::<R>(app, Scope::writing(&ctx)?, (id, revision), body).await
}

async fn delete<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    revision: IfMatch,
) -> Result<StatusCode, ApiError> {
    delete_of::<R>(app, Scope::writing(&ctx)?, (id, revision)).await
}

type Ids = Path<(String, String)>;

async fn list_below<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Path(parent): Id,
    Params(pairs): Pairs,
) -> Result<Json<Value>, ApiError> {
    list_of::<R>(app, Scope::reading(&ctx)?.below(parent), pairs).await
}

async fn show_below<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Path((parent, id)): Ids,
    Params(pairs): Pairs,
) -> Result<Json<Value>, ApiError> {
    show_of::<R>(app, Scope::reading(&ctx)?.below(parent), id, pairs).await
}

async fn create_below<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Path(parent): Id,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    create_of::<R>(app, Scope::writing(&ctx)?.below(parent), body).await
}

async fn update_below<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Path((parent, id)): Ids,
    revision: IfMatch,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    update_of::<R>(app, Scope::writing(&ctx)?.below(parent), (id, revision), body).await
}

async fn delete_below<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Path((parent, id)): Ids,
    revision: IfMatch,
) -> Result<StatusCode, ApiError> {
    delete_of::<R>(app, Scope::writing(&ctx)?.below(parent), (id, revision)).await
}

fn check_tag(tag: &str) -> Result<(), ApiError> {
    match tag.is_empty() || tag.chars().count() > MAX_TAG || tag.contains(',') {
        true => Err(invalid_input(format!("a tag must have 1 to {MAX_TAG} characters and no comma"))),
        false => Ok(()),
    }
}

fn checked_tags(list: &[Value]) -> Result<Vec<String>, ApiError> {
    if list.len() > MAX_TAGS {
        return Err(ApiError::BadRequest(format!(
            "The number of tags exceed the per-resource limit of {MAX_TAGS}"
        )));
    }
    let mut tags = BTreeSet::new();
    for value in list {
        let tag = value.as_str().ok_or_else(|| invalid_input(format!("'{value}' is not a valid string")))?;
        check_tag(tag)?;
        tags.insert(tag.to_owned());
    }
    Ok(tags.into_iter().collect())
}

async fn write_tags<R: Resource>(tx: &mut Conn, id: &str, tags: &[String]) -> Result<(), ApiError> {
    for tag in tags {
        sqlx::query(
            "INSERT INTO network_tags (resource_id, collection, tag) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        )
        .bind(id)
        .bind(R::COLLECTION.name)
        .bind(tag)
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
}

/// Removes the tags of a resource that goes.
pub(super) async fn forget_tags(tx: &mut Conn, id: &str) -> Result<(), ApiError> {
    sqlx::query("DELETE FROM network_tags WHERE resource_id = $1").bind(id).execute(tx).await?;
    Ok(())
}

async fn tags_of<R: Resource>(db: &mut Conn, scope: &Scope, id: &str) -> Result<Vec<Value>, ApiError> {
    let mut document = document::<R>(db, scope, id, &Query::default()).await?;
    Ok(document["tags"].as_array_mut().map(std::mem::take).unwrap_or_default())
}

/// The change of the tags of a resource that the asker may change.
async fn changing<R: Resource>(app: &App, ctx: &Ctx, id: &str) -> Result<(Change, Vec<Value>), ApiError> {
    let mut change = Change::begin(app, Scope::writing(ctx)?).await?;
    let document = document::<R>(&mut change.tx, &change.scope, id, &Query::default()).await?;
    if !change.scope.owns(document["project_id"].as_str().unwrap_or_default()) {
        return Err(ApiError::Forbidden("Only the owner of a resource and admins can tag it.".into()));
    }
    Ok((change, document["tags"].as_array().cloned().unwrap_or_default()))
}

async fn tags<R: Resource>(State(app): State<App>, ctx: Ctx, Path(id): Id) -> Result<Json<Value>, ApiError> {
    let scope = Scope::reading(&ctx)?;
    Ok(Json(json!({"tags": tags_of::<R>(&mut *app.db.acquire().await?, &scope, &id).await?})))
}

async fn tag<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, tag)): Ids,
) -> Result<StatusCode, ApiError> {
    let scope = Scope::reading(&ctx)?;
    let tags = tags_of::<R>(&mut *app.db.acquire().await?, &scope, &id).await?;
    match tags.contains(&json!(tag)) {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(no_tag(&tag)),
    }
}

fn no_tag(tag: &str) -> ApiError {
    ApiError::NotFound(format!("Tag {tag} could not be found.")).named("TagNotFound")
}

async fn replace_tags<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    JsonBody(mut body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let list = match body.get_mut("tags").map(Value::take) {
        Some(Value::Array(list)) => checked_tags(&list)?,
        _ => return Err(invalid_input("Invalid tags body")),
    };
    let (mut change, _) = changing::<R>(&app, &ctx, &id).await?;
    forget_tags(&mut change.tx, &id).await?;
    write_tags::<R>(&mut change.tx, &id, &list).await?;
    change.commit(&app).await?;
    Ok(Json(json!({"tags": list})))
}

async fn remove_tags<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
) -> Result<StatusCode, ApiError> {
    let (mut change, _) = changing::<R>(&app, &ctx, &id).await?;
    forget_tags(&mut change.tx, &id).await?;
    change.commit(&app).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn add_tag<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, tag)): Ids,
) -> Result<StatusCode, ApiError> {
    check_tag(&tag)?;
    let (mut change, mut tags) = changing::<R>(&app, &ctx, &id).await?;
    if !tags.contains(&json!(tag)) {
        tags.push(json!(tag));
    }
    let tags = checked_tags(&tags)?;
    write_tags::<R>(&mut change.tx, &id, &tags).await?;
    change.commit(&app).await?;
    Ok(StatusCode::CREATED)
}

async fn remove_tag<R: Resource>(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, tag)): Ids,
) -> Result<StatusCode, ApiError> {
    let (mut change, tags) = changing::<R>(&app, &ctx, &id).await?;
    if !tags.contains(&json!(tag)) {
        return Err(no_tag(&tag));
    }
    sqlx::query("DELETE FROM network_tags WHERE resource_id = $1 AND tag = $2")
        .bind(&id)
        .bind(&tag)
        .execute(&mut *change.tx)
        .await?;
    change.commit(&app).await?;
    Ok(StatusCode::NO_CONTENT)
}
